"""All problems of a configuration at once, and rules of the chain and the nodes that need no other settings."""

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import trainer_ranks
from megatron_vcppo.config.validation import check_config
from tests.helpers.small_config import error_of, small_config


@pytest.fixture
def config() -> Config:
    return small_config()


def test_the_defaults_are_sound(config: Config) -> None:
    check_config(config)
    assert trainer_ranks(config) == 1


def test_all_problems_are_listed(config: Config) -> None:
    config.sft.steps, config.sft.optimizer.beta2, config.sft.optimizer.lr = 0, 1.5, -1.0
    message = error_of(config)
    assert "3 problems" in message and "sft.steps must be in [1, inf), got 0" in message
    assert "sft.optimizer.beta2 must be in [0, 1), got 1.5" in message
    assert "sft.optimizer.lr must be in [0, inf), got -1.0" in message
    config.sft.steps, config.sft.optimizer.beta2, config.sft.optimizer.lr = 5, 0.9, 1.0
    config.stages = ["sft", "sft"]
    message = error_of(config)
    assert "stages names sft 2 times" in message and "warmup_steps 20 is more than sft.steps 5" in message


def test_a_job_requests_a_cpu_per_rank_and_names_stages_of_its_chain(config: Config) -> None:
    config.cluster.trainer_ranks, config.cluster.stage_time_limit_minutes = 4, {"pppo": 5}
    check_config(config)  # this machine has no job
    config.cluster.name = "big"
    message = error_of(config)
    assert "4 trainer ranks per node need as many CPUs; cluster.cpus_per_node is 1: raise it to 4" in message
    assert "stage_time_limit_minutes names no stage of this chain: pppo; the chain is sft" in message


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
