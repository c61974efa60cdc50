"""One PPO update equals plain torch, and itself under every layout and for every variant of the losses."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vcppo.config import Config
from megatron_vcppo.records import Rollout
from megatron_vcppo.stages.share_exchange import experts_format
from megatron_vcppo.stages.updates import UpdateMetrics
from tests.helpers.distributed import run_distributed_test
from tests.helpers.ppo_reference import reference_update, sampled
from tests.helpers.ppo_update import (
    HEAD,
    build,
    in_windows,
    make_config,
    make_rollouts,
    of_all_replicas,
    reference_of,
    save_models,
    share_of,
    with_observations,
)

VAPO = {
    "advantage": {"length_adaptive_alpha": 0.2},
    "loss": {"clip_high": 0.28, "positive_lm_coef": 0.1, "kl_coef": 0.05},
}

SAO = {
    "advantage": {"length_adaptive_alpha": 0.2},
    "loss": {"kind": "dis", "clip_low": 0.8, "clip_high": 0.3},
    "critic": {"frozen": ["*.self_attn.*"], "updates_per_actor_update": 2},
}


def train(config: Config, rollouts: list[Rollout]) -> dict[str, Any]:
    """What ``reference_update`` returns, on one rank of any layout; every [N] of the whole batch."""
    models = build(config)
    replays = any(rollout.routed_experts for rollout in rollouts)
    share = share_of(rollouts, experts_format(models.actor.model.arch) if replays else None)
    outputs, metrics = models.outputs(share), UpdateMetrics()
    advantages = models.advantages(share, outputs)
    models.updater.update(share, advantages, outputs, iteration=1, kl_coef=config.ppo.loss.kl_coef, metrics=metrics)
    assert not any(any(skipped) for skipped in metrics.skipped.values())
    after = {f"{name}_after": tensor for name, tensor in models.token_outputs(share).items()}
    tensors = {
        **outputs.by_name(),
        "advantages": advantages.advantages,
        "returns": advantages.returns,
        **after,
    }
    return {**metrics.means(), **{name: of_all_replicas(share, tensor) for name, tensor in tensors.items()}}


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


@pytest.mark.parametrize(
    ("family", "ppo"),
    [*((family, ppo) for family in ("qwen2", "qwen3") for ppo in ({}, VAPO, SAO)), ("qwen3_moe", VAPO)],
    ids=[*(f"{family}-{name}" for family in ("qwen2", "qwen3") for name in ("vcppo", "vapo", "sao")), "qwen3_moe-vapo"],
)
def test_an_update_equals_plain_torch(tmp_path: Path, family: str, ppo: dict[str, Any]) -> None:
    folder = save_models(tmp_path, family)
    config, rollouts = make_config(folder, ppo), make_rollouts()
    if ppo:  # with tokens of a tool
        rollouts = with_observations(rollouts)
    ours = run(config, rollouts)
    kept = torch.cat([sampled(rollout) for rollout in rollouts])
    ours |= {name: value[kept] for name, value in ours.items() if isinstance(value, torch.Tensor)}
    theirs = {
        name: torch.cat(value) if isinstance(value, list) else value
        for name, value in reference_update(folder, reference_of(config), HEAD, config, rollouts).items()
    }
    worst = distances({name: ours[name] for name in theirs}, theirs)
    assert max(worst.values()) <= 1e-4, worst
    moved = float((ours["logprobs_after"] - ours["old_logprobs"]).abs().max())
    assert moved > 0.05 and float((ours["values_after"] - ours["values"]).abs().max()) > 0.01
    left_out = ["actor/dis_masked_low", "actor/dis_masked_high"] if ppo is SAO else ["actor/clip_fraction"]
    assert all(ours[name] > 0 for name in left_out)


def test_windows_equal_plain_torch_and_are_the_same_under_every_layout(tmp_path: Path) -> None:
    """The actor learns from new tokens, the critic from finished responses; one minibatch has none."""
    folder = save_models(tmp_path, "qwen3")
    config, rollouts = make_config(folder, VAPO), in_windows(make_rollouts())
    alone = run(config, rollouts)
    theirs = {
        name: torch.cat(value) if isinstance(value, list) else value
        for name, value in reference_update(folder, reference_of(config), HEAD, config, rollouts).items()
    }
    worst = distances({name: alone[name] for name in theirs}, theirs)
    assert max(worst.values()) <= 1e-4, worst
    old = torch.cat([torch.arange(len(r.response_ids)) < r.num_trained for r in rollouts])
    assert not alone["advantages"][old].any() and alone["advantages"][~old].any()
    for layout in ("tp2pp2-sequence-parallel", "dp2-distributed-optimizer"):
        world_size, sizes = LAYOUTS[layout]
        worst = distances(alone, run(config, rollouts, world_size, **sizes))
        assert max(worst.values()) <= 1e-5, (layout, worst)


def with_experts(rollouts: list[Rollout]) -> list[Rollout]:
    """Of 2 layers with 8 experts, for every token but the last: 2 at random."""
    generator, found = np.random.default_rng(0), []
    for rollout in rollouts:
        length = len(rollout.prompt.token_ids) + len(rollout.response_ids)
        chosen = generator.random((length - 1, 2, 8)).argsort(-1)[..., :2].astype(np.uint8)
        found.append(replace(rollout, routed_experts=chosen.tobytes()))
    return found


@pytest.mark.parametrize("replays", [False, True], ids=["own experts", "routing replay"])
def test_an_update_of_a_mixture_is_the_same_with_divided_experts(tmp_path: Path, replays: bool) -> None:
    """Its minibatches leave replicas with unequal numbers of micro-batches, which share their experts."""
    config, rollouts = make_config(save_models(tmp_path, "qwen3_moe"), VAPO), make_rollouts()
    if replays:
        rollouts = with_experts(rollouts)
    alone = run(config, rollouts)
    worst = distances(alone, run(config, rollouts, 2, ep=2, distributed_optimizer=True))
    assert max(worst.values()) <= 1e-4, worst
    if replays:
        assert alone["actor/router_mismatch"] > 0.5, "the experts are random"
        assert alone["actor/approx_kl"] < 0.1, "old log-probs and updates go through the same ones"
    assert ("actor/router_mismatch" in alone) == replays and "critic/router_mismatch" not in alone


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2-distributed-optimizer": (2, {"distributed_optimizer": True}),
    "tp2pp2-sequence-parallel": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp": 2}),
}


@pytest.fixture(scope="module")
def vapo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[Rollout], dict[str, Any]]:
    """An update, and what one rank makes of it."""
    config, rollouts = make_config(save_models(tmp_path_factory.mktemp("vapo"), "qwen3"), VAPO), make_rollouts()
    return config, rollouts, run(config, rollouts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_is_the_same_under_every_layout(
    vapo: tuple[Config, list[Rollout], dict[str, Any]], layout: str
) -> None:
    config, rollouts, alone = vapo
    world_size, sizes = LAYOUTS[layout]
    worst = distances(alone, run(config, rollouts, world_size, **sizes))
    assert max(worst.values()) <= 1e-5, worst


def test_tools_and_a_frozen_critic_are_the_same_under_every_layout(tmp_path: Path) -> None:
    config, rollouts = make_config(save_models(tmp_path, "qwen3"), SAO), with_observations(make_rollouts())
    alone = run(config, rollouts)
    for layout in ("tp2pp2-sequence-parallel", "dp2-distributed-optimizer"):
        world_size, sizes = LAYOUTS[layout]
        worst = distances(alone, run(config, rollouts, world_size, **sizes))
        assert max(worst.values()) <= 1e-5, (layout, worst)


VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"ppo": {"advantage": {"baseline": "grpo", "whiten": False}, "loss": {"aggregation": "sequence"}}},
    "rloo": {"ppo": {"advantage": {"baseline": "rloo"}, "loss": {"aggregation": "constant_length"}}},
    "kl-in-reward": {"ppo": {"loss": {"kl_coef": 0.05, "kl_in": "reward", "kl_kind": "k1"}}},
    "importance-sampling": {"ppo": {"loss": {"tis_cap": 2.0, "dual_clip": 3.0, "entropy_coef": 0.01}}},
    "dis": {"ppo": {"loss": {"kind": "dis", "clip_low": 0.1, "clip_high": 0.1}}},
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Models, and what one rank makes of an update without variants."""
    folder = save_models(tmp_path_factory.mktemp("plain"))
    return folder, run(make_config(folder, {}), make_rollouts())


SLOW_VARIANTS = ("rloo", "importance-sampling", "overlong")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_VARIANTS else ()) for name in VARIANTS]
)
def test_a_variant_is_the_same_on_two_replicas(plain: tuple[Path, dict[str, Any]], variant: str) -> None:
    folder, without = plain
    config, rollouts = make_config(folder, **VARIANTS[variant]), make_rollouts()
    alone = run(config, rollouts)
    worst = distances(alone, run(config, rollouts, 2))
    assert max(worst.values()) <= 1e-5, worst
    after = [name for name in ("logprobs_after", "values_after") if name in alone]
    assert not all(torch.equal(alone[name], without[name]) for name in after), "the variant does nothing"


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
