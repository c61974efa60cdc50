"""One PPO update equals plain torch, and itself under every layout and for every variant of the losses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from megatron_vcppo.config import Config
from megatron_vcppo.data.rollout_batch import make_batch
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor, Critic, Reference
from megatron_vcppo.mcore.model import ActorModel, build_actor, build_critic
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.advantage_batch import compute_advantages
from megatron_vcppo.stages.stage import packer_of
from megatron_vcppo.stages.token_outputs import token_outputs
from megatron_vcppo.stages.training_losses import bounded
from megatron_vcppo.stages.updates import UpdateMetrics, update
from tests.helpers.distributed import run_distributed_test
from tests.helpers.ppo_reference import reference_update
from tests.helpers.tiny_models import VOCAB_SIZE, save_tiny_model

MAX_TOKENS = 24
SIZES: dict[str, Any] = {"num_hidden_layers": 2}
HEAD = torch.randn(64, generator=torch.Generator().manual_seed(5)) * 0.1
VAPO = {
    "advantage": {"length_adaptive_alpha": 0.2},
    "loss": {"clip_high": 0.28, "positive_lm_coef": 0.1, "kl_coef": 0.05},
}


def make_config(folder: Path, ppo: dict[str, Any], **sections: Any) -> Config:
    # A large eps: the division by the root of tiny second moments would magnify float32 noise in the weights.
    optimizer = {"lr": 5e-4, "weight_decay": 0.1, "beta1": 0.8, "eps": 1e-5}
    base = {
        "run": {"dir": str(folder), "seed": 3},
        "model": {"hf": str(folder), "dtype": "float32", "max_length": 64},
        "sft": {"train": ""},
        "prompts": {"train": ""},
        "parallel": {"tokens_per_microbatch": 96},
        "rollout": {"max_tokens": MAX_TOKENS, "temperature": 0.8, "num_samples": 2},
        "ppo": {"minibatches": 2, "ppo_epochs": 2, "optimizer": optimizer, "critic": {"optimizer": optimizer}},
    }
    merged = OmegaConf.merge(OmegaConf.structured(Config), base, {"ppo": ppo} | sections)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def save_models(folder: Path, family: str = "qwen2") -> Path:
    """The model that actor and critic start from, and another as the reference of KL terms."""
    save_tiny_model(folder / "reference", family, seed=1, **SIZES)
    return save_tiny_model(folder / "hf", family, **SIZES)


def reference_of(config: Config) -> Path:
    return Path(config.model.hf).with_name("reference")


def make_rollouts(num_prompts: int = 8, num_samples: int = 2, seed: int = 0) -> list[Rollout]:
    """Two samples of each prompt; one group has equal rewards, one response was cut."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rollouts = []
    for number in range(num_prompts):
        prompt = Prompt(f"p{number}", tuple(draw(0, VOCAB_SIZE) for _ in range(draw(2, 9))), "", "", "test")
        for sample in range(num_samples):
            length = MAX_TOKENS if number == 2 and sample == 0 else draw(3, MAX_TOKENS)
            ids = tuple(draw(0, VOCAB_SIZE) for _ in range(length))
            logprobs = tuple((torch.rand(length, generator=generator) * -4).tolist())
            reason = "length" if length == MAX_TOKENS else "stop"
            reward = 1.0 if (number + sample) % 2 or number == 5 else -1.0
            rollouts.append(Rollout(prompt, sample, 0, ids, "", logprobs, reason, 0, reward, ""))
    return rollouts


def build(config: Config) -> tuple[runtime.Runtime, Actor, Critic | None, Reference | None]:
    """This rank of any layout, and its part of the models."""
    world = runtime.start(config.parallel, config.run.seed, 60)
    arch = Architecture.from_hf(config.model.hf)

    def loaded(folder: str | Path) -> ActorModel:
        model = build_actor(arch, config.model, config.parallel)
        load_hf(model, folder)
        return model

    ppo, temperature = config.ppo, config.rollout.temperature
    actor = Actor(loaded(config.model.hf), config.parallel, ppo.optimizer, ppo.schedule, 4, temperature=temperature)
    critic = None
    if ppo.advantage.baseline == "critic":
        model = build_critic(arch, config.model, config.parallel)
        load_hf(model, config.model.hf)
        if world.is_last_stage:
            model.value_head.weight.data.copy_(HEAD[None])
        critic = Critic(model, config.parallel, ppo.critic.optimizer, ppo.critic.schedule, 4)
    reference = Reference(loaded(reference_of(config)), temperature) if ppo.loss.kl_coef else None
    return world, actor, critic, reference


def train(config: Config, rollouts: list[Rollout]) -> dict[str, Any]:
    """What ``reference_update`` returns, on one rank of any layout; every [B, T] as its valid tokens."""
    world, actor, critic, reference = build(config)
    ppo = config.ppo
    batch, packing = make_batch(rollouts), packer_of(config, world)
    fields = {
        "old_logprobs": token_outputs(batch, packing, actor.logprobs),
        "rollout_logprobs": batch.rollout_logprobs,
    }
    if reference is not None:
        fields["ref_logprobs"] = token_outputs(batch, packing, reference.logprobs)
    if critic is not None:
        fields["values"] = bounded(token_outputs(batch, packing, critic.values), config.values)
    values = fields.get("values")
    credit = compute_advantages(
        batch, values, fields["old_logprobs"], fields.get("ref_logprobs"), config, ppo.loss.kl_coef, None
    )
    kl_coef = ppo.loss.kl_coef if ppo.loss.kl_in == "loss" else 0.0
    report = UpdateMetrics()
    update(actor, critic, batch, credit, fields, packing, config, 1, kl_coef, report)
    assert not any(any(skipped) for skipped in report.skipped.values())
    after = {"logprobs_after": token_outputs(batch, packing, actor.logprobs)}
    if critic is not None:
        after |= {"values_after": token_outputs(batch, packing, critic.values)}
    tensors = {**fields, "advantages": credit.advantages, "returns": credit.returns, **after}
    return {**report.means(), **{name: tensor[batch.response_mask] for name, tensor in tensors.items()}}


def run(config: Config, rollouts: list[Rollout], world_size: int = 1, **layout: Any) -> dict[str, Any]:
    """The result under a layout, after a check that all its ranks have the same."""
    config = copy.deepcopy(config)
    for name, value in layout.items():
        setattr(config.parallel, name, value)
    first, *rest = run_distributed_test(train, world_size, config, rollouts, timeout_s=120)
    for other in rest:
        assert set(distances(first, other).values()) == {0.0}
    return first


def distances(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    assert a.keys() == b.keys()
    # Fractions count tokens beyond a border, and noise moves single ones across it; packing differs by design.
    names = [name for name in a if not name.endswith("_fraction") and not name.startswith("packing/")]
    return {name: float((torch.as_tensor(a[name]) - torch.as_tensor(b[name])).abs().max()) for name in names}


@pytest.mark.parametrize("ppo", [{}, VAPO], ids=["vcppo", "vapo"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_update_equals_plain_torch(tmp_path: Path, family: str, ppo: dict[str, Any]) -> None:
    folder = save_models(tmp_path, family)
    config, rollouts = make_config(folder, ppo), make_rollouts()
    ours = run(config, rollouts)
    theirs = {
        name: torch.cat(value) if isinstance(value, list) else value
        for name, value in reference_update(folder, reference_of(config), HEAD, config, rollouts).items()
    }
    worst = distances({name: ours[name] for name in theirs}, theirs)
    assert max(worst.values()) <= 1e-4, worst
    moved = float((ours["logprobs_after"] - ours["old_logprobs"]).abs().max())
    assert moved > 0.05 and float((ours["values_after"] - ours["values"]).abs().max()) > 0.01
    assert ours["actor/clip_fraction"] > 0


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2-distributed-optimizer": (2, {"distributed_optimizer": True}),
    "tp2pp2-sequence-parallel": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp": 2}),
}


def test_an_update_is_the_same_under_every_layout(tmp_path: Path) -> None:
    folder = save_models(tmp_path, "qwen3")
    config, rollouts = make_config(folder, VAPO), make_rollouts()
    alone = run(config, rollouts)
    for name, (world_size, layout) in LAYOUTS.items():
        worst = distances(alone, run(config, rollouts, world_size, **layout))
        assert max(worst.values()) <= 1e-5, f"{name}: {worst}"


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"ppo": {"advantage": {"baseline": "grpo", "whiten": False}, "loss": {"aggregation": "sequence"}}},
    "rloo": {"ppo": {"advantage": {"baseline": "rloo"}, "loss": {"aggregation": "constant_length"}}},
    "kl-in-reward": {"ppo": {"loss": {"kl_coef": 0.05, "kl_in": "reward", "kl_kind": "k1"}}},
    "importance-sampling": {"ppo": {"loss": {"tis_cap": 2.0, "dual_clip": 3.0, "entropy_coef": 0.01}}},
    "critic": {
        "ppo": {"critic": {"value_clip": 0.05, "updates_per_actor_update": 2}},
        "values": {"bounds": [-1.0, 1.0], "huber_delta": 0.5},
    },
    "overlong": {
        "ppo": {"advantage": {"explained_variance_gate": True}},
        "returns": {"overlong_filter": True, "overlong_penalty_tokens": 8},
    },
}
"""Sections of the configuration."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_the_same_on_two_replicas(tmp_path: Path, variant: str) -> None:
    folder = save_models(tmp_path)
    config, rollouts = make_config(folder, **VARIANTS[variant]), make_rollouts()
    alone, plain = run(config, rollouts), run(make_config(folder, {}), rollouts)
    worst = distances(alone, run(config, rollouts, 2))
    assert max(worst.values()) <= 1e-5, worst
    after = [name for name in ("logprobs_after", "values_after") if name in alone]
    assert not all(torch.equal(alone[name], plain[name]) for name in after), "the variant does nothing"


def test_fewer_rollouts_than_replicas(tmp_path: Path) -> None:
    """A replica without work joins with padding alone."""
    folder = save_models(tmp_path)
    config, rollouts = make_config(folder, {"ppo_epochs": 1}), make_rollouts(num_prompts=2, num_samples=1)
    worst = distances(run(config, rollouts), run(config, rollouts, 2))
    assert max(worst.values()) <= 1e-5, worst


def test_a_batch_without_variance_changes_little(tmp_path: Path) -> None:
    """Equal rewards and a perfect critic leave no advantage: the update is finite and the policy stays."""
    folder = save_models(tmp_path)
    config = make_config(folder, {"advantage": {"baseline": "grpo"}, "optimizer": {"weight_decay": 0.0}})
    rollouts = [Rollout(**{**vars(r), "reward": -1.0}) for r in make_rollouts()]
    result = run(config, rollouts)
    assert float(result["advantages"].abs().max()) == 0.0
    assert torch.equal(result["logprobs_after"], result["old_logprobs"])
    assert all(bool(torch.as_tensor(value).isfinite().all()) for value in result.values())
