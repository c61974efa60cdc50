"""What is refused before a job is queued."""

from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.checks import check_critics, check_inputs
from tools.benchmarks._tiny_chains import tiny_config
from tools.benchmarks._tiny_models import save_tiny_model


def test_inputs_are_checked_before_anything_is_queued(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    assert check_inputs(config, ["sft"])["sft"] > 3
    config.sft.train = "/no/such/file.jsonl"
    with pytest.raises(UserError, match=r"sft\.train: /no/such/file\.jsonl does not exist"):
        check_inputs(config, ["sft"])
    config.sft.train, config.parallel.tp = __file__, 3
    with pytest.raises(UserError, match="attention heads 4 is not divisible by tp 3"):
        check_inputs(config, ["sft"])
    config.model.hf = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        check_inputs(config, ["sft"])


def test_a_critic_that_could_not_be_exported_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config.model.hf, config.export.critic = str(save_tiny_model(tmp_path / "olmo2", "olmo2")), True
    with pytest.raises(UserError, match=r"export\.critic: transformers has no olmo2 for token classification"):
        check_inputs(config, ["export"])
    config.export.critic = False
    check_inputs(config, ["export"])


def test_a_reward_model_is_a_stage_before_or_a_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config.stages = ["value_pretrain", "reward_model", "ppo"]
    config.value_pretrain.init, config.ppo.critic.init = "sft", "sft"
    config.rewards.model.stage = "reward_model"
    check_critics(config, ["ppo"])
    message = r"rewards\.model\.stage reward_model needs stage reward_model, which is neither before value_pretrain"
    with pytest.raises(UserError, match=message):
        check_critics(config, ["value_pretrain", "ppo"])
    config.rewards.model.stage = None
    config.rewards.model.path = str(save_tiny_model(tmp_path / "no_reward_model"))
    assert check_inputs(config, ["sft"]), "SFT does not read it"
    with pytest.raises(UserError, match=r"rewards\.model\.path: .*is not a checkpoint for sequence classification"):
        check_inputs(config, ["ppo"])


def test_routing_replay_is_for_mixtures(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", ("ppo",))
    config.ppo.routing_replay = True
    with pytest.raises(UserError, match=r"ppo\.routing_replay is for mixtures of experts, and .*model has none"):
        check_inputs(config, ["ppo"])
    check_inputs(config, ["sft"])
    config.model.hf = str(save_tiny_model(tmp_path / "mixture", "qwen3_moe", max_position_embeddings=8192))
    check_inputs(config, ["ppo"])
