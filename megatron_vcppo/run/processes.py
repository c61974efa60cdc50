"""Environment and lifetime of an engine's processes."""

import ctypes
import signal
import socket
from collections.abc import Mapping

PR_SET_PDEATHSIG = 1

TRAINER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK")
TRAINER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_", "OMP_", "MKL_", "OPENBLAS_")


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


def free_port(address: str) -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def alive(pid: int) -> bool:
    """True if the process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
