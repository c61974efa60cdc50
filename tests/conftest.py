"""One thread per process, set before torch is imported: ranks are forked from the test process."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402

from tests.helpers.te.install import installed  # noqa: E402
from tests.helpers.te.process import Call, te_process  # noqa: E402


@pytest.fixture(scope="session")
def te_ranks() -> Iterator[Call]:
    """``run_distributed_test`` in a process that has Transformer Engine's Python; the others never see it."""
    if not installed():
        pytest.skip("Transformer Engine's Python package is not in .te: run tools/install_te.sh")
    with te_process() as call:
        yield call
