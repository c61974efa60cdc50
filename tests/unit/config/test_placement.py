"""Whether a node holds a whole replica, which decides how weights reach engines on the trainer's GPUs."""

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import node_holds_replica


@pytest.mark.parametrize(
    ("nodes", "ranks", "tp", "pp", "cp", "whole"),
    [
        (1, 8, 2, 2, 1, True),
        (2, 16, 8, 1, 1, True),
        (4, 32, 4, 1, 2, True),
        (2, 16, 8, 2, 1, False),
        (2, 8, 8, 1, 1, False),
        (2, 12, 4, 1, 1, False),
    ],
)
def test_a_node_holds_a_replica_without_pipeline_stages_elsewhere(
    nodes: int, ranks: int, tp: int, pp: int, cp: int, whole: bool
) -> None:
    config = Config()
    config.cluster.trainer_nodes = nodes
    config.parallel.tp, config.parallel.pp, config.parallel.cp = tp, pp, cp
    assert node_holds_replica(config, ranks) == whole
