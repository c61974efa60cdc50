"""Several chains of this machine at once: each is a command of its own, on CPUs that no other has.

A chain of one rank keeps its core busy while it generates and while it trains; the ranks of a chain on all cores wait
for engines, and engines for ranks. Threads of ranks and engines follow from the CPUs that a process may use.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_vcppo.errors import DONE, SAVED, SIGNALLED
from megatron_vcppo.launch.controller import describe
from megatron_vcppo.launch.guard import GUARD_ARGUMENTS
from megatron_vcppo.launch.guarded_process import adopting, kill_adopted
from megatron_vcppo.launch.local_chain import stop_requests
from megatron_vcppo.report.text_table import duration
from megatron_vcppo.run.log import printable, say

POLL_S = 0.2
ABORT_S = 60.0
"""How long a chain may take to leave at the second Ctrl-C; then everything of it is killed."""
INTERRUPTED = SIGNALLED + signal.SIGINT


@dataclass(frozen=True)
class ChainCommand:
    """One chain. Example: ``ChainCommand("VC-PPO, seed 0", Path("runs/x"), ("vcppo", "run", "x.yaml"))``."""

    label: str
    """In front of each line that it prints."""
    run: Path
    command: tuple[str, ...]
    base: Path | None = None
    """The run that it begins with: it waits for that one if that is among the chains, and is left out if it fails."""


class _Running:
    """A chain at work, behind a guard, so that nothing of it outlives this process."""

    def __init__(self, chain: ChainCommand, cpus: Sequence[int]) -> None:
        self.chain, self.num_asked, self.aborted_at = chain, 0, float("inf")
        environment, self.mark = adopting(os.environ)
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)  # inherited
        try:
            self.process = subprocess.Popen(
                (sys.executable, *GUARD_ARGUMENTS, *chain.command),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which passes it on
            )
        finally:
            os.sched_setaffinity(0, allowed)
        self.reader = threading.Thread(target=self._copy, daemon=True)
        self.reader.start()

    def _copy(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(OSError):  # nobody reads any more; a chain must not wait for that
                print(f"{self.chain.label} | {printable(line.rstrip())}\n", end="", flush=True)  # one write, one line

    def ask(self, count: int) -> None:
        """Pass on the requests to stop: the first means after a save, the second at once."""
        if count > self.num_asked and self.process.poll() is None:
            self.num_asked += 1  # one signal at a time: two that are pending are one
            self.process.send_signal(signal.SIGINT)
            self.aborted_at = time.monotonic() if self.num_asked > 1 else self.aborted_at
        if time.monotonic() - self.aborted_at > ABORT_S:
            self.end()

    def end(self) -> None:
        """Kill what is left of it, and wait for the last line of its output."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.wait() < 0:
            kill_adopted(self.mark, self.process.pid)
        self.reader.join(5)


def run_at_once(chains: Sequence[ChainCommand], shares: Sequence[Sequence[int]]) -> int:
    """Run all chains, one on each of the shares of CPUs at a time, in their order as far as bases allow.

    Returns the worst exit code; SAVED if a request to stop left something to do. A chain that fails does not keep the
    others from running.
    """
    waiting, running, failed = [*chains], dict[int, _Running](), set[Path]()
    code, stopped, started = DONE, False, time.monotonic()
    with stop_requests() as requests:
        try:
            while waiting or running:
                asked = min(requests["save"], 1) + min(requests["abort"], 1)
                if asked and waiting:
                    waiting, stopped = [], True
                for chain in [chain for chain in waiting if chain.base in failed]:
                    say(f"experiment: {chain.label}: left out, because its shared stages failed")
                    waiting.remove(chain)
                for place, cpus in enumerate(shares):
                    unfinished = {one.run for one in waiting} | {one.chain.run for one in running.values()}
                    chosen = next((chain for chain in waiting if chain.base not in unfinished), None)
                    if place in running or chosen is None:
                        continue
                    waiting.remove(chosen)
                    say(f"experiment: {chosen.label}: starting on CPUs {', '.join(map(str, cpus))}")
                    running[place] = _Running(chosen, cpus)
                for place, one in [*running.items()]:
                    one.ask(asked)
                    if one.process.poll() is None:
                        continue
                    one.end()
                    del running[place]
                    result = one.process.returncode
                    result = SIGNALLED - result if result < 0 else result
                    if result == SAVED or (asked == 1 and result == INTERRUPTED):  # interrupted before it had begun
                        stopped = True
                        failed.add(one.chain.run)  # saved by a signal of its own: nothing can begin with it yet
                        continue
                    to_go = remaining(started, len(chains) - len(waiting) - len(running), len(chains))
                    say(f"experiment: {one.chain.label}: {'done' if result == DONE else describe(result)}{to_go}")
                    if result != DONE:
                        failed.add(one.chain.run)
                        code = max(code, result)
                time.sleep(POLL_S)
        finally:
            for one in running.values():
                one.end()
    return SAVED if stopped and code == DONE else code


def shares_of(cpus: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """CPUs in that many groups of neighbors, equal but for one. count: at most the number of CPUs."""
    return [tuple(cpus[i * len(cpus) // count : (i + 1) * len(cpus) // count]) for i in range(count)]


def remaining(started: float, num_done: int, total: int) -> str:
    """When the rest would be done if it took as long per chain as those before. started: of ``time.monotonic``."""
    if not num_done or num_done == total:
        return ""
    elapsed = time.monotonic() - started
    return f"; {duration(elapsed)} so far, about {duration(elapsed / num_done * (total - num_done))} to go"
