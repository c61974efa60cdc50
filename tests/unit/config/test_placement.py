"""Which nodes and GPUs the trainer and the engines take, and how weights reach engines on the trainer's GPUs.

What cannot be placed is in tests/slurm/test_recipes.py.
"""

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import (
    engine_nodes,
    engine_placement,
    node_holds_replica,
    trainer_gpus_per_node,
    trainer_ranks,
)


@pytest.fixture
def config() -> Config:
    config = Config()
    config.stages = ["sft", "ppo"]
    config.cluster.name, config.cluster.trainer_nodes, config.cluster.gpus_per_node = "big", 2, 8
    config.rollout.engine.per_node, config.rollout.engine.tp = 2, 2
    return config


@pytest.mark.parametrize(
    ("engines_on", "rollout_nodes", "placement", "nodes", "gpus"),
    [
        (None, 3, "rollout_nodes", 3, 8),
        (None, 0, "trainer_nodes", 2, 4),
        ("trainer_nodes", 0, "trainer_nodes", 2, 4),
        ("trainer_gpus", 0, "trainer_gpus", 2, 8),
    ],
)
def test_the_trainer_takes_the_gpus_that_engines_leave(
    config: Config, engines_on, rollout_nodes: int, placement: str, nodes: int, gpus: int
) -> None:
    config.cluster.engines_on, config.cluster.rollout_nodes = engines_on, rollout_nodes
    assert (engine_placement(config), engine_nodes(config)) == (placement, nodes)
    assert trainer_gpus_per_node(config) == gpus and trainer_ranks(config) == 2 * gpus


def test_a_chain_that_does_not_generate_leaves_no_gpu_idle(config: Config) -> None:
    config.stages = ["sft", "export"]
    assert trainer_ranks(config) == 16


def test_without_gpus_ranks_follow_the_parallel_sizes(config: Config) -> None:
    config.cluster.gpus_per_node, config.parallel.pp = 0, 2
    assert trainer_gpus_per_node(config) == 0 and trainer_ranks(config) == 2


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
