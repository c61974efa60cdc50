"""Values that do not fit each other are refused with the numbers."""

import pytest

from megatron_vcppo.config import Config, checks
from megatron_vcppo.config.checks import check_config, trainer_ranks
from megatron_vcppo.config.keys import all_keys
from megatron_vcppo.errors import UserError


@pytest.fixture
def config() -> Config:
    config = Config()
    config.run.dir, config.model.hf, config.sft.train, config.stages = "runs/x", "models/x", "x.jsonl", ["sft"]
    return config


def error_of(config: Config) -> str:
    with pytest.raises(UserError) as failure:
        check_config(config)
    return str(failure.value)


def test_the_defaults_are_sound(config: Config) -> None:
    check_config(config)
    assert trainer_ranks(config) == 1


def test_sizes_that_do_not_divide_the_ranks(config: Config) -> None:
    config.parallel.tp, config.parallel.pp, config.cluster.trainer_ranks = 4, 2, 12
    assert error_of(config) == "parallel: tp 4 × pp 2 × cp 1 × dp must divide 12 ranks; 8 does not"
    with pytest.raises(UserError, match="12 ranks"):
        trainer_ranks(config)


def test_dp_that_contradicts_the_cluster(config: Config) -> None:
    config.parallel.tp, config.parallel.dp = 2, 3
    assert trainer_ranks(config) == 6
    config.cluster.trainer_nodes, config.cluster.gpus_per_node = 2, 4
    assert "tp 2 × pp 1 × cp 1 × dp 3 needs 6 ranks, the cluster section has 8" in error_of(config)
    config.parallel.dp = None
    assert trainer_ranks(config) == 8


def test_ranks_must_divide_over_nodes(config: Config) -> None:
    config.cluster.trainer_nodes, config.cluster.trainer_ranks = 2, 3
    assert "3 trainer ranks do not divide over trainer_nodes 2" in error_of(config)


def test_sequence_parallel_needs_tensor_parallel(config: Config) -> None:
    config.parallel.sequence_parallel = True
    assert "sequence_parallel needs parallel.tp over 1, got 1" in error_of(config)


def test_context_parallelism_counts_ranks_and_needs_room_for_its_padding(config: Config) -> None:
    config.parallel.cp, config.parallel.tp = 2, 2
    check_config(config)
    assert trainer_ranks(config) == 4
    config.parallel.tokens_per_microbatch = 7
    assert "tokens_per_microbatch 7 is under 2 × cp 2 × tp 2 = 8, to which sequences are padded" in error_of(config)
    config.cluster.trainer_ranks = 6
    assert "tp 2 × pp 1 × cp 2 × dp must divide 6 ranks; 4 does not" in error_of(config)


def test_all_problems_are_listed(config: Config) -> None:
    config.sft.steps, config.sft.optimizer.beta2, config.sft.optimizer.lr = 0, 1.5, -1.0
    config.stages = ["sft", "sft"]
    message = error_of(config)
    assert "sft.steps must be over 0, got 0" in message
    assert "sft.optimizer.beta2 must lie in 0 … 1, 1 left out, got 1.5" in message
    assert "sft.optimizer.lr must not be negative, got -1.0" in message
    assert "sft is named 2 times" in message


def test_every_number_has_a_range() -> None:
    """A new key is put into one of the sets, or has a check of its own."""
    numbers = {
        name for name, key in all_keys().items() if key.type_text.split()[:2] in (["a", "whole"], ["a", "number"])
    }
    ranges = checks.POSITIVE | checks.NOT_NEGATIVE | checks.FRACTIONS | checks.BELOW_ONE
    own = {"ppo.loss.dual_clip", "rollout.engine.sleep_level"}
    assert {name for name in numbers if name.rpartition(".")[2] not in ranges} == own


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(config: Config, value: float) -> None:
    config.sft.optimizer.lr = value
    assert error_of(config) == f"sft.optimizer.lr must be finite, got {value}"


def test_warm_up_longer_than_training(config: Config) -> None:
    config.sft.steps, config.sft.schedule.warmup_steps = 5, 20
    assert "warmup_steps 20 is more than sft.steps 5" in error_of(config)


def test_secrets_are_kept_out_of_stored_configurations(config: Config) -> None:
    config.cluster.environment = {"WANDB_API_KEY": "hush", "NCCL_DEBUG": "INFO"}
    message = error_of(config)
    assert "cluster.environment.WANDB_API_KEY looks like a secret" in message
    assert "hush" not in message and "NCCL" not in message


def test_fp8_needs_bfloat16_transformer_engine_and_gpus(config: Config) -> None:
    config.model.fp8, config.cluster.gpus_per_node = "hybrid", 8
    check_config(config)
    config.model.dtype = "float32"
    assert error_of(config) == "model.fp8 hybrid needs model.dtype bfloat16, got float32"
    config.model.dtype, config.model.layers = "bfloat16", "torch"
    assert error_of(config) == "model.fp8 hybrid needs Transformer Engine's layers, but model.layers is torch"
    config.model.layers, config.cluster.gpus_per_node = "auto", 0
    assert error_of(config) == "model.fp8 hybrid needs GPUs, but cluster.gpus_per_node is 0: set model.fp8=off"
