"""What is refused before a job is queued."""

from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.launch import checks
from megatron_vcppo.launch.checks import check_critics, check_inputs
from megatron_vcppo.launch.memory_plan import OVERHEAD_GIB
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


def test_a_model_that_no_checkpoint_could_take_along_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    check_inputs(config, ["sft"])
    (Path(config.model.hf) / "NOTES.md").symlink_to(__file__)
    with pytest.raises(UserError, match=r"NOTES\.md: a symbolic link that leads out of"):
        check_inputs(config, ["sft"])


def test_what_this_machine_has_no_memory_for_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B by mistake on a login node: the machine would swap for minutes before the kernel ends a rank."""
    config = tiny_config(tmp_path / "run", ("sft", "export"), ranks=4)
    stages = ["sft", "export"]
    need = 4 * (check_inputs(config, stages)["sft"] - OVERHEAD_GIB)
    monkeypatch.setattr(checks, "machine_gib", lambda: 0.9 * need)
    with pytest.raises(
        UserError, match=r"sft needs about .* GiB of main memory on this machine \(.* each of 4 ranks\)"
    ):
        check_inputs(config, stages)
    check_inputs(config, ["export"])
    config.cluster.gpus_per_node = 4
    check_inputs(config, stages)
    config.cluster.gpus_per_node, config.cluster.name = 0, "big"
    check_inputs(config, stages)
    monkeypatch.setattr(checks, "machine_gib", lambda: 1.1 * need)
    config.cluster.name = "local"
    check_inputs(config, stages)


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
