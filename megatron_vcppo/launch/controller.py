"""Runs one attempt of a stage: starts its roles, watches all of them, ends all of them.

A role process is a rank or a supervisor on this machine, or one srun step of many tasks on a cluster.
The trainer decides the outcome; a rollout supervisor that dies alone is started again, a bounded number of times.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_vcppo.errors import DONE, FAILED, SAVED, SIGNALLED, USER_ERROR
from megatron_vcppo.launch.guarded_process import Executed, GuardedProcess
from megatron_vcppo.launch.preloaded import Preloaded
from megatron_vcppo.run.log import Follower, last_lines, say

PORT_TAKEN = "address already in use"
"""torch's message: the port was free when the attempt was laid out; the next attempt takes another."""
UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes were trans")
"""Messages of Slurm's commands: slurmctld is down, restarting or overloaded."""
TIMED_OUT = ("Timed out waiting", "collective operation timeout")
"""Messages of gloo and NCCL: a rank did not come to a collective within run.timeout_s."""
POLL_S = 0.05
SETTLE_S = 0.5
"""Exits within this window are judged together, so that the killed rank is blamed and not the peers that failed
because of it."""
HANG_SETTLE_S = 5.0
"""After a collective timed out: ranks that have not left by themselves then are those that hang."""
TASK_ENDED = re.compile(r"\btasks? (\d+)([\d,-]*): (?:Exited with exit code (\d+)|(.+))$", re.MULTILINE)
"""srun's report of ended tasks: "srun: error: node7: tasks 3-5,9: Exited with exit code 1", "…: task 2: Killed"."""
SIGNAL_WORDS = {signal.strsignal(number): number for number in signal.valid_signals()}
SIGNAL_WORDS |= {"Out Of Memory": signal.SIGKILL}


@dataclass(frozen=True)
class RoleProcess:
    """One process to start.

    Example: ``RoleProcess("trainer", 0, ("python", "train.py"), {"RANK": "0"}, "trainer_0.log")``.
    """

    role: str
    """trainer | rollout"""
    index: int
    command: tuple[str, ...]
    env: dict[str, str]
    """Added to the controller's environment; an empty value removes the variable."""
    log: str
    """File name inside the attempt's log folder."""
    shown_log: str | None = None
    """The file that is also copied to the terminal: rank 0's."""
    restarts: int = 0
    task_nodes: tuple[str, ...] = ()
    """Of an srun step: the node of each task. srun's messages in ``log`` say which of them ended, and how."""
    end_signal: int = signal.SIGTERM
    """What ends the process when the attempt is over. SIGKILL for local ranks: they hang in collectives."""
    preloaded: Preloaded | None = None
    """What it is forked from; default: it is executed."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.role} {self.index}"

    def whole_environment(self) -> dict[str, str]:
        """Of the process, on this machine."""
        return {key: value for key, value in {**os.environ, **self.env}.items() if value}


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    code: int
    """As in errors.py; 128 + n: killed by signal n."""
    cause: str = ""
    """Who ended first and how, in one line."""
    details: list[str] = field(default_factory=list)
    """The last lines of the log of the one that ended first."""
    node_lost: bool = False
    """A node of the allocation no longer answers: the stage needs other ones."""
    leaving_s: float | None = None
    """Seconds from the request to save to the end, if there was one."""

    @property
    def killed(self) -> bool:
        """Something outside the code ended it.

        A signal, a rollout role that died too often, a port taken meanwhile, a Slurm controller that did not answer, a
        rank that hung.
        """
        log = "".join(self.details)
        return self.code > SIGNALLED or (
            self.code == FAILED and any(words in log for words in (PORT_TAKEN, *UNREACHABLE, *TIMED_OUT))
        )


@dataclass
class _Started:
    role_process: RoleProcess
    process: GuardedProcess
    log_start: int
    restarts: int = 0
    start_again_at: float | None = None


def describe(code: int) -> str:
    """An exit code as text."""
    if code > SIGNALLED:
        try:
            return f"was killed by {signal.Signals(code - SIGNALLED).name}"
        except ValueError:
            pass
    return f"left with exit code {code}"


def taken_port(role_process: RoleProcess, code: int, details: list[str]) -> str:
    """Which port was taken, as the tail of a sentence, if that is why the process failed."""
    if code != FAILED or PORT_TAKEN not in "".join(details):
        return ""
    env = role_process.env
    return f": port {env.get('MASTER_PORT', '?')} of {env.get('MASTER_ADDR', 'its node')} is taken"


def timed_out(code: int, details: list[str]) -> bool:
    """Whether the process failed because another rank did not come to a collective. NCCL's watchdog aborts it."""
    return code in (FAILED, SIGNALLED + signal.SIGABRT) and any(words in "".join(details) for words in TIMED_OUT)


def waited_for(hanging: list[str]) -> str:
    """The ranks that hang, as the tail of a sentence."""
    more = f" and {len(hanging) - 4} more" if len(hanging) > 4 else ""
    return f": waited in vain for {', '.join(hanging[:4]) or 'another rank'}{more} (run.timeout_s)"


def ended_tasks(text: str, count: int) -> set[int]:
    """Those of a step's ``count`` tasks that srun's messages report as ended."""
    spans = [span for tasks in TASK_ENDED.findall(text) for span in re.findall(r"(\d+)-?(\d*)", "".join(tasks[:2]))]
    return {task for task in range(count) if any(int(first) <= task <= int(last or first) for first, last in spans)}


def reported_code(text: str) -> int:
    """The exit code of the task that srun's messages show to be the cause; 0 if none failed. 75 is no failure.

    The first one named, but a kill before exit codes: peers of a killed rank may be reported before it.
    """
    codes = []
    for _, _, code, words in TASK_ENDED.findall(text):
        number = SIGNAL_WORDS.get(words.removesuffix(" (core dumped)"))
        if number is not None:
            codes.append(SIGNALLED + number)
        elif code and int(code) != SAVED:
            codes.append(int(code))
    killed = [code for code in codes if code > SIGNALLED and code != SIGNALLED + signal.SIGTERM]
    return next(iter([*killed, *codes]), 0)


class Attempt:
    """The processes of one attempt and their logs, in ``logs``."""

    def __init__(self, processes: list[RoleProcess], logs: Path, grace_s: float) -> None:
        self.logs, self.grace_s = logs, grace_s
        self.asked_at: float | None = None
        """When the trainer was asked to save and leave."""
        logs.mkdir(parents=True, exist_ok=True)
        self.followers = [Follower(logs / one.shown_log) for one in processes if one.shown_log]
        self.started: list[_Started] = []
        try:
            for role_process in processes:
                self.started.append(_Started(role_process, *self._start(role_process)))
        except BaseException:  # such as a full disk: no room for the next log
            self.stop()
            raise

    def _start(self, role_process: RoleProcess) -> tuple[GuardedProcess, int]:
        """The process and where its part of the log begins."""
        env, log, start = role_process.whole_environment(), self.logs / role_process.log, role_process.preloaded
        log_start = log.stat().st_size if log.exists() else 0
        process = start.fork(role_process.command, env, log) if start else Executed(role_process.command, env, log)
        return process, log_start

    def of(self, role: str) -> list[_Started]:
        """The processes of a role."""
        return [started for started in self.started if started.role_process.role == role]

    def send(self, role: str, number: int) -> None:
        """Send a signal to the running processes of a role."""
        for started in self.of(role):
            if started.process.poll() is None:
                started.process.send_signal(number)

    def ended(self, role: str) -> list[tuple[RoleProcess, int]]:
        """The processes of a role that have ended, with exit codes; 128 + n after a signal.

        A step has ended, too, once one of its tasks has failed: srun itself may wait long for a node that is gone.
        """
        codes = [(started.role_process, self.code(started)) for started in self.of(role)]
        return [(role_process, code) for role_process, code in codes if code is not None]

    def code(self, started: _Started) -> int | None:
        """Its exit code, None while it runs."""
        code = started.process.poll()
        if started.role_process.task_nodes:
            code = reported_code(self.own_log(started)) or code
        return code if code is None or code >= 0 else SIGNALLED - code

    def own_log(self, started: _Started) -> str:
        """What its log has got since it was started."""
        with (self.logs / started.role_process.log).open(errors="replace") as log:
            log.seek(started.log_start)
            return log.read()

    def running_ranks(self) -> dict[str, Path]:
        """The log of each rank of the trainer that has not ended, by the rank's name."""
        logs: dict[str, Path] = {}
        for started in self.of("trainer"):
            one = started.role_process
            if one.task_nodes:
                ended = ended_tasks(self.own_log(started), len(one.task_nodes))
                names = {n: f"{one.role} {n} on {node}" for n, node in enumerate(one.task_nodes) if n not in ended}
            else:
                names = {one.index: one.name} if self.code(started) is None else {}
            logs |= {name: self.logs / f"{one.role}_{number}.log" for number, name in names.items()}
        return logs

    def restart_rollouts(self) -> Outcome | None:
        """Start ended rollout processes again, after 1, 2, 4, … s; an outcome if one died for good."""
        for started in self.of("rollout"):
            code = self.code(started)
            if code is None:
                continue
            if started.start_again_at is None:
                self.end(started)
                if code == USER_ERROR or started.restarts >= started.role_process.restarts:
                    cause = f"{started.role_process.name} {describe(code)} after {started.restarts} restarts"
                    code = code if code == USER_ERROR else SIGNALLED + signal.SIGKILL
                    return Outcome(code, cause, self.tail(started.role_process))
                delay_s = min(30.0, 2.0**started.restarts)
                say(f"{started.role_process.name} {describe(code)}: started again in {delay_s:.0f} s")
                started.start_again_at = time.monotonic() + delay_s
            elif time.monotonic() >= started.start_again_at:
                started.process.release()
                started.restarts, started.start_again_at = started.restarts + 1, None
                started.process, started.log_start = self._start(started.role_process)
        return None

    def tail(self, role_process: RoleProcess) -> list[str]:
        """The last lines of a process's log; for a step of many tasks those of the task that srun names first, too."""
        lines = last_lines(self.logs / role_process.log)
        if not lines and role_process.preloaded:  # it ended before it was forked: why, is where the imports write
            lines = last_lines(role_process.preloaded.log)
        if role_process.shown_log and role_process.shown_log != role_process.log:
            named = TASK_ENDED.search("\n".join(lines))
            lines = lines[:4] + last_lines(self.logs / f"{role_process.role}_{named[1] if named else 0}.log")
        return lines

    def end(self, started: _Started) -> None:
        """Ask one process to end, if it still runs."""
        if started.process.poll() is None and started.role_process.end_signal != signal.SIGKILL:
            started.process.send_signal(started.role_process.end_signal)
        else:
            started.process.release()

    def stop(self) -> None:
        """End every process: its end signal, after the grace a closed guard, which kills all descendants."""
        for started in self.started:
            self.end(started)
        for deadline, last_resort in ((self.grace_s, False), (self.grace_s + 5, True)):
            end = time.monotonic() + deadline
            while time.monotonic() < end and any(started.process.poll() is None for started in self.started):
                time.sleep(POLL_S)
            for started in self.started:
                started.process.release()
                if last_resort and started.process.poll() is None:
                    started.process.kill()
        for follower in self.followers:
            follower.close()


def first_death(ended: list[tuple[RoleProcess, int]]) -> tuple[RoleProcess, int]:
    """Of deaths seen together, the one that is the cause: a kill before an error, an error before a save."""
    return max(ended, key=lambda item: (item[1] > SIGNALLED, item[1] not in (DONE, SAVED), -item[0].index))


def supervise(
    processes: list[RoleProcess],
    logs: Path,
    *,
    save_requested: Callable[[], bool] = lambda: False,
    abort_requested: Callable[[], bool] = lambda: False,
    save_allowance_s: Callable[[], float] = lambda: 600.0,
    follow_timeout_s: float = 600.0,
    grace_s: float = 10.0,
) -> Outcome:
    """Run one attempt to its end. ``save_requested`` becoming true sends USR2 to the trainer, once.

    save_allowance_s: called at that moment; seconds until an attempt that has not ended by itself is ended.
    follow_timeout_s: how long the other ranks may take once one has left well.
    """
    attempt = Attempt(processes, logs, grace_s)
    try:
        outcome = _watch(attempt, save_requested, abort_requested, save_allowance_s, follow_timeout_s)
        if attempt.asked_at is None:
            return outcome
        return replace(outcome, leaving_s=round(time.monotonic() - attempt.asked_at, 1))
    finally:
        attempt.stop()


def _watch(
    attempt: Attempt,
    save_requested: Callable[[], bool],
    abort_requested: Callable[[], bool],
    save_allowance_s: Callable[[], float],
    follow_timeout_s: float,
) -> Outcome:
    trainers = attempt.of("trainer")
    save_deadline = settled_at = float("inf")
    allowance_s = 0.0
    hanging = False
    while True:
        now = time.monotonic()
        ended = attempt.ended("trainer")
        if attempt.asked_at is not None:
            interrupted = SIGNALLED + signal.SIGUSR2
            ended = [(role_process, SAVED if code == interrupted else code) for role_process, code in ended]
        if ended and settled_at == float("inf"):
            bad = any(code not in (DONE, SAVED) for _, code in ended)
            settled_at = now + (SETTLE_S if bad else follow_timeout_s)
        if ended and not hanging and any(code not in (DONE, SAVED) for _, code in ended):
            settled_at = min(settled_at, now + SETTLE_S)
        over = not attempt.running_ranks() if hanging else len(ended) == len(trainers)
        if over or now >= settled_at:
            role_process, code = first_death(ended)
            how = f"{role_process.name} {describe(code)}"
            if code in (DONE, SAVED) and len(ended) < len(trainers):
                return Outcome(FAILED, f"{how} but other ranks did not follow in {follow_timeout_s:.0f} s")
            if code in (DONE, SAVED):
                return Outcome(code, "" if code == DONE else how)
            details = attempt.tail(role_process)
            if not timed_out(code, details):
                return Outcome(code, how + taken_port(role_process, code, details), details)
            if hanging:
                logs = attempt.running_ranks()
                names = [name for name, log in logs.items() if not timed_out(FAILED, last_lines(log))]
                return Outcome(code, how + waited_for(names), details)
            hanging, settled_at = True, now + HANG_SETTLE_S
        if not ended and (outcome := attempt.restart_rollouts()):
            return outcome
        if abort_requested():
            return Outcome(SIGNALLED + signal.SIGINT, "stopped at once, without saving")
        if attempt.asked_at is None and save_requested():
            allowance_s = save_allowance_s()
            say(f"asking the trainer to save and leave within {allowance_s:.0f} s")
            attempt.send("trainer", signal.SIGUSR2)
            attempt.asked_at, save_deadline = now, now + allowance_s
        if now > save_deadline:
            return Outcome(FAILED, f"the trainer did not save within {allowance_s:.0f} s")
        time.sleep(POLL_S)
