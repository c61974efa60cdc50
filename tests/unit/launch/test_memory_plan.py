"""What the memory plan says, against what real ranks held, and how it follows layout and settings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import load_config
from megatron_vcppo.config.value_sources import CONFIGS
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapters import adapter_parameters
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.frozen import frozen_counts
from megatron_vcppo.launch.chain_plan import checkpoint_gb
from megatron_vcppo.launch.memory_plan import GIB, OPTIMIZER_BYTES, WEIGHT_BYTES, check_memory, plan, plan_of_rank
from tools.benchmarks._tiny_chains import tiny_model
from tools.benchmarks._tiny_models import save_tiny_model


def measured_model(folder: Path) -> Architecture:
    """The model that ``tools/bench.py memory`` builds by default: 103 M parameters."""
    sizes = {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 8, "num_attention_heads": 12}
    sizes |= {"num_key_value_heads": 6, "vocab_size": 32768, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "float32", **sizes}))
    return Architecture.from_hf(str(folder))


@pytest.mark.parametrize(
    ("stage", "layout", "held_gib", "peak_gib"),
    [
        ("sft", {}, 1.56, 2.35),
        ("sft", {"tp": 2}, 0.79, 1.24),
        ("sft", {"tp": 2, "sequence_parallel": True}, 0.80, 1.20),
        ("sft", {"pp": 2}, 0.80, 1.37),
        ("sft", {"dp": 2, "distributed_optimizer": True}, 1.18, 1.96),
        ("sft", {"recompute": "full"}, 1.56, 1.81),
        ("value_pretrain", {}, 1.57, 2.19),
        ("ppo", {}, 2.73, 3.59),
    ],
)
def test_the_plan_is_what_real_ranks_held(
    tmp_path: Path, stage: str, layout: dict[str, Any], held_gib: float, peak_gib: float
) -> None:
    """The figures that tools/bench.py memory measured, between steps and within one (docs/slurm.md)."""
    arch, config = measured_model(tmp_path), Config()
    config.model.dtype, config.model.max_length, config.parallel.tokens_per_microbatch = "float32", 1024, 1024
    for key, value in layout.items():
        setattr(config.parallel, key, value)
    parts = plan(arch, config, stage)
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == pytest.approx(held_gib, rel=0.05)
    assert sum(parts.values()) - parts["overhead"] == pytest.approx(peak_gib, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "layout", "held_gib", "peak_gib"),
    [
        ("sft", {}, 0.432, 1.126),
        ("sft", {"recompute": "full"}, 0.431, 0.591),
    ],
)
def test_the_plan_of_adapters_is_what_real_ranks_held(
    tmp_path: Path, stage: str, layout: dict[str, Any], held_gib: float, peak_gib: float
) -> None:
    """The same with --lora-rank 16. Next to so little what ranks hold besides shows: 0.03 GiB."""
    arch, config = measured_model(tmp_path), Config()
    config.model.dtype, config.model.max_length, config.parallel.tokens_per_microbatch = "float32", 1024, 1024
    config.model.lora.rank = 16
    for key, value in layout.items():
        setattr(config.parallel, key, value)
    parts = plan(arch, config, stage)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == pytest.approx(held_gib, abs=0.03)
    assert sum(parts.values()) - parts["overhead"] == pytest.approx(peak_gib, rel=0.06)


def test_stages_of_uneven_pipelines_are_planned_by_their_layers(tmp_path: Path) -> None:
    arch, config = measured_model(tmp_path), Config()
    config.parallel.pp, config.parallel.first_stage_layers = 3, 4
    first, middle, last = (plan_of_rank(arch, config, "sft", rank) for rank in range(3))
    # 4, 2 and 2 of 8 layers; embedding and output layer are of one size; the first stage has 3 micro-batches at once.
    assert first["weights"] - last["weights"] == pytest.approx(middle["weights"])
    assert first["activations"] == pytest.approx(3 * middle["activations"])
    assert plan(arch, config, "sft") == first
    config.parallel.first_stage_layers = None
    assert plan_of_rank(arch, config, "sft", 2)["weights"] < last["weights"] * 1.01, "3, 3 and 2"


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Architecture, Config]:
    config = load_config(CONFIGS / "models" / "tiny.yaml", complete=False)
    return Architecture.from_hf(str(tiny_model(tmp_path))), config


def test_bfloat16_halves_what_is_not_the_optimizers(tiny: tuple[Architecture, Config]) -> None:
    arch, config = tiny
    float32 = plan(arch, config, "ppo")
    config.model.dtype = "bfloat16"
    bfloat16 = plan(arch, config, "ppo")
    for name in ("weights", "logits"):
        assert bfloat16[name] == float32[name] / 2, name
    assert float32["activations"] < 2 * bfloat16["activations"], "a norm in float32 keeps a tensor less"
    assert bfloat16["gradients"] == float32["gradients"], "summed in float32"
    assert bfloat16["optimizer"] == float32["optimizer"] * 1.5, "a float32 copy of the weights next to two moments"


def test_a_stage_holds_the_models_that_it_trains_and_pushes(tiny: tuple[Architecture, Config]) -> None:
    arch, config = tiny
    sft, value_pretrain, ppo = (plan(arch, config, stage) for stage in ("sft", "value_pretrain", "ppo"))
    assert value_pretrain["weights"] == ppo["weights"], "a critic and the actor that generates"
    assert value_pretrain["gradients"] == ppo["gradients"] - sft["gradients"] and not value_pretrain["logits"]
    config.ppo.loss.kl_coef = 0.1
    assert plan(arch, config, "ppo")["weights"] == ppo["weights"] + sft["weights"], "the frozen reference"


def test_a_reward_model_is_held_by_the_stages_whose_responses_it_scores(
    tiny: tuple[Architecture, Config], tmp_path: Path
) -> None:
    arch, config = tiny
    stages = ("reward_model", "value_pretrain", "ppo")
    alone = [plan(arch, config, stage)["weights"] for stage in stages]
    config.rewards.model.path = str(save_tiny_model(tmp_path / "large", hidden_size=128, num_hidden_layers=8))
    large = Architecture.from_hf(config.rewards.model.path)
    trunk = large.parameter_count() - large.vocab_size * large.hidden_size
    added = [plan(arch, config, stage)["weights"] - before for stage, before in zip(stages, alone, strict=True)]
    size = 2 if config.model.dtype == "bfloat16" else 4
    assert added == pytest.approx([0, trunk * size / 2**30, trunk * size / 2**30])
    config.rewards.model.path, config.rewards.model.stage = None, "reward_model"
    added = [plan(arch, config, stage)["weights"] - before for stage, before in zip(stages, alone, strict=True)]
    assert added[0] == 0 and added[1] == added[2] > 0


def test_frozen_parameters_have_no_gradients_and_no_optimizer_state(tiny: tuple[Architecture, Config]) -> None:
    arch, config = tiny
    config.parallel.pp = 2
    before = [plan_of_rank(arch, config, "ppo", rank) for rank in (0, 1)]
    disk = checkpoint_gb(arch, config, "ppo")
    config.ppo.critic.frozen = ["*.self_attn.*", "model.embed_tokens.*"]
    layers, _, embedding = frozen_counts(arch, config.ppo.critic.frozen, "")
    assert layers > 0 and embedding == arch.vocab_size * arch.hidden_size
    for rank, (old, frozen) in enumerate(zip(before, (layers / 2 + embedding, layers / 2), strict=True)):
        new = plan_of_rank(arch, config, "ppo", rank)
        assert (old["gradients"] - new["gradients"]) * 2**30 == pytest.approx(4 * frozen)
        assert (old["optimizer"] - new["optimizer"]) * 2**30 == pytest.approx(8 * frozen)
        assert new["weights"] == old["weights"]
    assert disk - checkpoint_gb(arch, config, "ppo") == pytest.approx(8 * (layers + embedding) / 1e9)
    alone = plan(arch, config, "value_pretrain")
    config.value_pretrain.frozen = ["*.self_attn.*"]
    assert plan(arch, config, "value_pretrain")["gradients"] < alone["gradients"]
    config.ppo.critic.frozen = ["*.attention.*"]
    with pytest.raises(UserError, match=r"ppo\.critic\.frozen: no parameter matches"):
        check_memory(arch, config, ["ppo"])
    config.ppo.advantage.baseline = "grpo"
    check_memory(arch, config, ["ppo"])


def test_fp8_adds_a_byte_per_parameter_of_layers_that_run(tiny: tuple[Architecture, Config]) -> None:
    arch, config = tiny
    assert "8-bit weights" not in plan(arch, config, "ppo")
    config.model.fp8, config.ppo.loss.kl_coef = "hybrid", 0.1
    layers_gib = (arch.parameter_count() - 2 * arch.vocab_size * arch.hidden_size) / 2**30
    for stage, copies in (("ppo", 5), ("value_pretrain", 2), ("evaluate", 0)):
        assert plan(arch, config, stage)["8-bit weights"] == pytest.approx(copies * layers_gib), stage


def test_adapters_are_trained_on_one_base(tiny: tuple[Architecture, Config]) -> None:
    arch, config = tiny
    full = {stage: plan(arch, config, stage) for stage in ("sft", "value_pretrain", "ppo")}
    config.model.lora.rank, config.ppo.loss.kl_coef = 4, 0.1
    adapters = adapter_parameters(arch, config.model.lora)
    size = WEIGHT_BYTES[config.model.dtype]
    sft, value_pretrain, ppo = (plan(arch, config, stage) for stage in full)
    assert ppo["gradients"] == pytest.approx(2 * adapters * 4 / GIB)
    assert ppo["optimizer"] == pytest.approx(2 * adapters * OPTIMIZER_BYTES[config.model.dtype] / GIB)
    one = full["sft"]["weights"]
    assert sft["weights"] == pytest.approx(one + adapters * size / GIB)
    assert value_pretrain["weights"] == pytest.approx(one + 2 * adapters * size / GIB)
    assert ppo["weights"] == pytest.approx(one + 3 * adapters * size / GIB), "a reference has adapters alone"
    config.ppo.critic.init = "checkpoint"
    own = full["ppo"]["weights"] - one
    assert plan(arch, config, "ppo")["weights"] == pytest.approx(ppo["weights"] + own), "a critic from elsewhere"
    tp2 = replace(config, parallel=replace(config.parallel, tp=2))
    assert adapters / 2 < adapter_parameters(arch, config.model.lora, 2) < adapters
    assert plan(arch, tp2, "ppo")["gradients"] == pytest.approx(
        2 * adapter_parameters(arch, config.model.lora, 2) * 4 / GIB
    )


def test_the_plan_follows_the_layout(tiny: tuple[Architecture, Config]) -> None:
    arch, config = tiny
    alone = plan(arch, config, "sft")
    config.parallel.tp = 2
    assert plan(arch, config, "sft")["gradients"] == alone["gradients"] / 2
    assert alone["activations"] / 2 < plan(arch, config, "sft")["activations"] < alone["activations"]
    config.parallel.sequence_parallel = True
    assert plan(arch, config, "sft")["activations"] == alone["activations"] / 2
    config.parallel.tp, config.parallel.sequence_parallel, config.parallel.dp = 1, False, 4
    config.parallel.distributed_optimizer = True
    assert plan(arch, config, "sft")["optimizer"] == alone["optimizer"] / 4
    config.parallel.dp, config.parallel.cp = None, 2
    shared = plan(arch, config, "sft")
    for name in ("activations", "optimizer"):
        assert shared[name] == pytest.approx(alone[name] / 2), name
    assert shared["weights"] == alone["weights"] and shared["gradients"] == alone["gradients"]
    config.parallel.cp, config.parallel.pp = 1, 2
    first, last = (plan_of_rank(arch, config, "sft", rank) for rank in (0, 1))
    assert first["activations"] == alone["activations"] and not first["logits"], "two micro-batches of half the layers"
    assert last["activations"] == alone["activations"] / 2 and last["logits"] == alone["logits"]


def test_what_does_not_fit_is_refused_with_its_parts(tiny: tuple[Architecture, Config]) -> None:
    arch, config = tiny
    config.cluster.gpu_memory_gib = 3
    with pytest.raises(UserError, match=r"ppo needs about 3 GiB per GPU \(weights 0\.0, "):
        check_memory(arch, config, ["ppo"])


def test_experts_are_divided_over_expert_parallel_ranks_and_the_rest_over_tensor_parallel_ones(tmp_path: Path) -> None:
    arch, config = Architecture.from_hf(save_tiny_model(tmp_path, "qwen3_moe")), Config()
    experts, all_gib = arch.expert_parameter_count(), 4 / 2**30
    rest = arch.parameter_count() - experts
    config.parallel.dp, config.parallel.distributed_optimizer, config.parallel.sequence_parallel = 8, True, True

    def gradients_and_optimizer(tp: int, ep: int) -> tuple[float, float]:
        config.parallel.tp, config.parallel.dp, config.parallel.ep = tp, 8 // tp, ep
        parts = plan(arch, config, "sft")
        return parts["gradients"], parts["optimizer"]

    state = 12 * arch.parameter_count() / 8 / 2**30
    assert gradients_and_optimizer(1, 1) == pytest.approx(((experts + rest) * all_gib, state))
    assert gradients_and_optimizer(1, 4) == pytest.approx(((experts / 4 + rest) * all_gib, state))
    assert gradients_and_optimizer(2, 8) == pytest.approx(((experts / 8 + rest / 2) * all_gib, state))
