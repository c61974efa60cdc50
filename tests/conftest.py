"""One thread per process, set before torch is imported: ranks are forked from the test process."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from megatron_vcppo.launch.guard import PR_SET_CHILD_SUBREAPER, descendants  # noqa: E402
from megatron_vcppo.run.processes import alive  # noqa: E402
from tests.helpers.te.install import installed  # noqa: E402
from tests.helpers.te.process import Call, te_process  # noqa: E402

ENDING_S = 10.0
"""What processes that were told to end may take."""
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "wandb-core", "_inductor/compile_worker")
"""Libraries end them with this process."""


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """At the end of the session no process that a test started is alive, whoever has become its parent meanwhile."""
    adopt_orphans()
    yield
    end = time.monotonic() + ENDING_S
    while (left := left_processes(os.getpid())) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "tests left processes: " + "; ".join(f"{pid} {line}" for pid, line in left.items())


def adopt_orphans() -> None:
    """From now on processes below this one whose parent ends become its children, in place of init's."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def left_processes(root: int) -> dict[int, str]:
    """Command lines of the live processes below ``root``, by id."""
    found = {}
    for pid in descendants(root):
        if not alive(pid):
            continue
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if not any(helper in line for helper in HELPERS):
                found[pid] = line[:200]
    return found


@pytest.fixture(scope="session")
def te_ranks() -> Iterator[Call]:
    """``run_distributed_test`` in a process that has Transformer Engine's Python; the others never see it."""
    if not installed():
        pytest.skip("Transformer Engine's Python package is not in .te: run tools/install_te.sh")
    with te_process() as call:
        yield call
