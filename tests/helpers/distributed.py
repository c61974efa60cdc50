"""Runs a plain function on real gloo ranks, forked from the test process, with a bounded join.

Forking after importing Megatron once costs milliseconds a rank; a fresh interpreter costs seven seconds.
"""

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megatron_vcppo.launch.guard import descendants
from megatron_vcppo.run.processes import die_with_parent, free_port

GRACE_S = 3.0
"""How long the other ranks may continue once one has failed: long enough to report a failure of their own."""
LOG_TAIL_CHARACTERS = 1500


class RanksFailed(AssertionError):
    """At least one rank raised, died or hung; the message holds what every rank left behind."""


def run_distributed_test(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0, **kwargs: Any
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on ``world_size`` forked ranks and return their results in rank order.

    Each rank has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, one thread, and its output in a file.
    ``fn`` may be a closure; its result is anything torch.save takes. Joining the process group is up to ``fn``.
    Raises RanksFailed if a rank raises, dies, or is not done after ``timeout_s``; a hung rank's stack is reported.
    """
    importlib.import_module("megatron_vcppo.mcore.cpu_shim").install()  # imports much of Megatron, here once for all
    importlib.import_module("megatron_vcppo.mcore.runtime")
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that exist only in its parent
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        folder, port = Path(name), free_port("127.0.0.1")
        ranks = [
            # not daemons: a rank may start processes of its own
            context.Process(target=_rank_main, args=(fn, rank, world_size, port, folder, args, kwargs))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _join(ranks, timeout_s)
            if any(process.exitcode for process in ranks) or any(process.is_alive() for process in ranks):
                _dump_stacks(ranks)
                raise RanksFailed(_failure_report(ranks, folder, timeout_s))
        finally:
            for process in ranks:
                if process.is_alive():  # no guard is there that would take along what it started
                    assert process.pid is not None
                    for child in descendants(process.pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(child, signal.SIGKILL)
                process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _join(ranks: Sequence[BaseProcess], timeout_s: float) -> None:
    """Wait until every rank ended, until the deadline, or until GRACE_S after the first failure."""
    deadline = time.monotonic() + timeout_s
    while alive := [process for process in ranks if process.exitcode is None]:
        # Before the wait: a rank may close its sentinel a moment before it has an exit code.
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return
        wait([process.sentinel for process in alive], timeout=remaining_s)


def _dump_stacks(ranks: Sequence[BaseProcess]) -> None:
    """Ask the ranks that still run to write every thread's stack to their files."""
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    if alive:
        time.sleep(0.3)


def _failure_report(ranks: Sequence[BaseProcess], folder: Path, timeout_s: float) -> str:
    """What happened, rank by rank, the first failure first."""

    def when(rank: int) -> float:
        error = folder / f"{rank}.error"
        return error.stat().st_mtime if error.exists() else float("inf")

    parts = []
    for rank in sorted(range(len(ranks)), key=when):
        process = ranks[rank]
        state = f"still running after {timeout_s:g} s or after another rank's failure" if process.is_alive() else ""
        state = state or ("finished" if process.exitcode == 0 else f"exit code {process.exitcode}")
        lines = [f"rank {rank}: {state}"]
        for kind in ("error", "stack", "log"):
            path = folder / f"{rank}.{kind}"
            text = path.read_text(errors="replace").strip() if path.exists() else ""
            if text:
                lines.append(f"--- {kind} of rank {rank}\n{text[-LOG_TAIL_CHARACTERS:] if kind == 'log' else text}")
        parts.append("\n".join(lines))
    return "distributed test failed\n" + "\n".join(parts)


def _rank_main(
    fn: Callable[..., Any], rank: int, world_size: int, port: int, folder: Path, args: tuple[Any, ...], kwargs: Any
) -> None:
    """The forked child: environment, output to a file, the function, its result or its traceback to a file."""
    gc.freeze()  # an earlier test's group or store has threads that this process lacks, and would wait for them
    die_with_parent()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    log = open(folder / f"{rank}.log", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    with open(folder / f"{rank}.stack", "w", encoding="utf-8") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            torch.save(fn(*args, **kwargs), folder / f"{rank}.result")
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)
    os._exit(0)  # no atexit handlers: they are the parent's
