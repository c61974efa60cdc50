"""The life of processes: their death with their parent, whether they live, ports, variables and GPUs for those to be
started, and a deadline for waits that have none.

launch/guard.py runs without this package and has its own ``die_with_parent``.
"""

import atexit
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_vcppo.errors import DONE, FAILED
from megatron_vcppo.run.log import say

PR_SET_PDEATHSIG = 1

TRAINER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK")
TRAINER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_", "OMP_", "MKL_", "OPENBLAS_")

GPU_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA (CUDA may make its device files only when it is used first), of AMD, of Windows' subsystem for Linux: where
there is a GPU, there is one of these."""


def has_gpu_driver() -> bool:
    """Whether this machine may have a GPU, without the seconds that torch's import costs."""
    return any(Path(driver).exists() for driver in GPU_DRIVERS)


def without_trainer(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would make vLLM take itself for a rank of the trainer's world or a Slurm task.

    Thread counts go too: an engine uses the CPUs that it is given, a rank one of them.
    """
    return {
        name: value
        for name, value in environment.items()
        if name not in TRAINER_VARIABLES and not name.startswith(TRAINER_PREFIXES)
    }


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def show_command(words: Sequence[str]) -> None:
    """Have ``ps`` show these words as this process's command line, as far as the room of the real one goes."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    begin, end = int(fields[45]), int(fields[46])
    text = "\0".join(words).encode()[: max(0, end - begin - 1)]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def leave(code: int) -> NoReturn:
    """End this process as the interpreter does, threads and exit functions first, but leave modules and objects to the
    kernel: taking those of torch and Megatron apart costs 2 s of processor time."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # a full disk does not change how it ended
        os._exit(code)


def exit_code(end: SystemExit) -> int:
    """As the interpreter does, print what is no number."""
    if end.code is None or isinstance(end.code, int):
        return end.code or DONE
    print(end.code, file=sys.stderr)
    return FAILED


def free_port(address: str = "") -> int:
    """A TCP port on which nobody listens just now; default: at any of this machine's addresses."""
    return free_ports(1, address)[0]


def free_ports(count: int, address: str = "") -> tuple[int, ...]:
    """Different TCP ports on which nobody listens just now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((address, 0))
        return tuple(int(probe.getsockname()[1]) for probe in probes)
    finally:
        for probe in probes:
            probe.close()


def alive(pid: int) -> bool:
    """True if the process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def deadline(what: str, timeout_s: float, progress: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End this process as failed if the block hangs: not done, and no other ``progress()`` for ``timeout_s``.

    Such a wait cannot be interrupted, so there is no exception: the stacks of all threads and ``what`` are printed.
    progress: called every few seconds in a thread; must not raise.
    """
    done = threading.Event()

    def watch() -> None:
        seen, since = progress(), time.monotonic()
        while not done.wait(min(10.0, timeout_s / 5)):
            now = progress()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > timeout_s:
                faulthandler.dump_traceback()
                say(f"{what} has made no progress for {timeout_s:g} s")
                os._exit(FAILED)

    watcher = threading.Thread(target=watch, name=f"deadline of {what}", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
