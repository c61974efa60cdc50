"""One task and one engine for the tests of stages: an engine takes longer to start than most of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.rollout_stages import make_task
from tools.benchmarks._rollout_node import RolloutNode


@pytest.fixture(scope="package")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("stages") / "task")


@pytest.fixture(scope="package")
def node(task: Path) -> Iterator[RolloutNode]:
    """It outlives the runs that use it, as it would in a job; each run's first push gives it that run's weights."""
    with RolloutNode(task.parent / "node", task / "base_model", {"engine": {"max_num_seqs": 8}}) as node:
        node.wait()
        yield node
