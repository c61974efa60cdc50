"""How ranks fit the parallel sizes, nodes and GPUs; what cannot is refused with the numbers.

Engines are in tests/slurm/test_recipes.py and test_node_rules.py.
"""

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import data_parallel_size, trainer_ranks
from megatron_vcppo.config.validation import check_config
from megatron_vcppo.errors import UserError
from tests.helpers.small_config import error_of, small_config


@pytest.fixture
def config() -> Config:
    return small_config()


def test_sizes_that_do_not_divide_the_ranks(config: Config) -> None:
    config.parallel.tp, config.parallel.pp, config.cluster.trainer_ranks = 4, 2, 12
    message = (
        "parallel: tp 4 × pp 2 × cp 1 = 8 must divide 12 trainer ranks: change these sizes, or the number of ranks"
    )
    assert error_of(config).startswith(message)
    with pytest.raises(UserError, match="must divide 12 trainer ranks"):
        data_parallel_size(config.parallel, 12)
    assert data_parallel_size(config.parallel, 16) == 2


def test_dp_that_contradicts_the_cluster(config: Config) -> None:
    config.parallel.tp, config.parallel.dp = 2, 3
    assert trainer_ranks(config) == 6
    config.cluster.trainer_nodes, config.cluster.gpus_per_node = 2, 4
    assert "tp 2 × pp 1 × cp 1 × dp 3 needs 6 ranks, the cluster section has 8: set parallel.dp to 4" in error_of(
        config
    )
    config.parallel.dp = None
    assert trainer_ranks(config) == 8


def test_ranks_must_divide_over_nodes(config: Config) -> None:
    config.cluster.trainer_nodes, config.cluster.trainer_ranks = 2, 3
    assert "3 trainer ranks do not divide over trainer_nodes 2" in error_of(config)


def test_sequence_parallel_needs_tensor_parallel(config: Config) -> None:
    config.parallel.sequence_parallel = True
    assert "sequence_parallel needs parallel.tp > 1, got 1" in error_of(config)


def test_layers_of_the_ends_need_a_pipeline(config: Config) -> None:
    config.parallel.first_stage_layers, config.parallel.last_stage_layers = 3, 2
    assert "parallel.first_stage_layers 3 needs parallel.pp > 1, got 1" in error_of(config)
    config.parallel.pp = 2
    check_config(config)


def test_expert_parallel_ranks_are_those_of_a_pipeline_stage(config: Config) -> None:
    config.parallel.pp, config.parallel.ep, config.parallel.dp = 2, 4, 3
    assert "parallel.ep 4 must divide the 3 ranks of a pipeline stage (tp 1 × cp 1 × dp 3)" in error_of(config)
    config.parallel.tp, config.parallel.cp, config.parallel.dp = 2, 2, 1
    check_config(config)
    assert trainer_ranks(config) == 8


def test_context_parallelism_counts_ranks_and_needs_room_for_its_padding(config: Config) -> None:
    config.parallel.cp, config.parallel.tp = 2, 2
    check_config(config)
    assert trainer_ranks(config) == 4
    config.parallel.tokens_per_microbatch = 7
    assert "tokens_per_microbatch 7 must be at least 2 × cp 2 × tp 2 = 8, to which sequences are padded" in error_of(
        config
    )
    config.cluster.trainer_ranks = 6
    assert "tp 2 × pp 1 × cp 2 = 4 must divide 6 trainer ranks" in error_of(config)


@pytest.mark.parametrize("name", ["local", "big"])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"trainer_ranks": 16}, "16 trainer ranks per node need as many GPUs; cluster.gpus_per_node is 8"),
        ({"trainer_nodes": 4, "trainer_ranks": 8}, "parallel.tp 4 would span nodes: only 2 ranks are on each of 4"),
    ],
)
def test_ranks_fit_their_nodes_here_and_on_a_cluster(
    config: Config, sizes: dict[str, int], message: str, name: str
) -> None:
    config.cluster.name, config.cluster.trainer_ranks, config.cluster.gpus_per_node = name, 8, 8
    config.parallel.tp = 4
    check_config(config)
    for key, value in sizes.items():
        setattr(config.cluster, key, value)
    assert message in error_of(config)
