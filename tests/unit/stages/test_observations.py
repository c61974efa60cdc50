"""Tokens that a tool wrote: every number is that of the same rollouts with these tokens taken out."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vcppo.algo.diagnostics import length_statistics
from megatron_vcppo.config import Config
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.rollout_share import ModelOutputs, RolloutShare
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.advantage_batch import AdvantageBatch, compute_advantages
from megatron_vcppo.stages.training_losses import ActorLoss, CriticLoss, LossSize
from megatron_vcppo.stages.updates import Updater

MAX_TOKENS, END_OF_THINKING = 12, 9
TOKENS = st.lists(st.booleans(), min_size=0, max_size=10)
"""Of a response, without its first: whether the policy sampled it."""


def rollout_of(index: int, is_sampled: list[bool], reward: float) -> Rollout:
    spans, start = [], 0
    while start < len(is_sampled):
        end = start
        while end < len(is_sampled) and not is_sampled[end]:
            end += 1
        if end > start:
            spans.append((start, end))
        start = end + 1
    ids = [END_OF_THINKING if t % 4 == 2 else 10 + t for t in range(len(is_sampled))]
    logprobs = [-0.1 * (1 + t % 4) if sampled else 0.0 for t, sampled in enumerate(is_sampled)]
    prompt = Prompt(f"p{index // 2}", (1, 2), "", "", "t")
    return Rollout(prompt, index % 2, 0, ids, "", logprobs, "stop", 0, reward, observations=spans)


def without_observations(rollout: Rollout) -> Rollout:
    kept = [t for t in range(len(rollout.response_ids)) if not any(a <= t < b for a, b in rollout.observations)]
    ids, logprobs = rollout.response_ids, rollout.rollout_logprobs
    return replace(
        rollout, response_ids=[ids[t] for t in kept], rollout_logprobs=[logprobs[t] for t in kept], observations=()
    )


def make_config(kind: str, aggregation: str, baseline: str) -> Config:
    config = Config()
    config.rollout.max_tokens, config.ppo.advantage.length_adaptive_alpha = MAX_TOKENS, 0.4
    config.ppo.loss.kind, config.ppo.loss.aggregation = kind, aggregation  # type: ignore[assignment]
    config.ppo.advantage.baseline = baseline  # type: ignore[assignment]
    config.ppo.loss.entropy_coef, config.ppo.loss.kl_coef, config.ppo.loss.positive_lm_coef = 0.1, 0.2, 0.1
    config.ppo.loss.tis_cap = 2.0 if kind == "clip" else None
    return config


def outputs_of(share: RolloutShare, noise: dict[str, Tensor]) -> ModelOutputs:
    """noise: [N]; the logits of the tokens of tools are far off, so that whoever reads one shows it."""
    return ModelOutputs(noise["old"], share.rollout_logprobs, noise["ref"], noise["values"])


def advantages_of(config: Config, share: RolloutShare, outputs: ModelOutputs) -> AdvantageBatch:
    if config.ppo.advantage.baseline != "critic":
        outputs = replace(outputs, values=None)
    return compute_advantages(
        share,
        outputs,
        config.ppo.advantage,
        config.ppo.loss,
        returns_config=config.returns,
        kl_coef=config.ppo.loss.kl_coef,
        max_tokens=MAX_TOKENS,
        end_of_thinking_id=END_OF_THINKING,
        total=lambda sums: sums,
    )


def losses_of(
    config: Config, share: RolloutShare, outputs: ModelOutputs, advantages: AdvantageBatch, now: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Loss of actor and critic, their metrics, and their gradients at the tokens: [N]."""
    updater = Updater(None, None, Packer(64, 1, 0, 1), config.ppo, config.values, config.returns, 0, MAX_TOKENS)  # type: ignore[arg-type]
    fields = updater.fields(advantages, outputs) | {"now": now}
    microbatches = updater.microbatches(share, fields, [*range(len(share.batch))])
    size = LossSize.of(share.batch, torch.ones(len(share.batch), dtype=torch.bool), MAX_TOKENS)
    found: dict[str, float] = {}
    gradients = []
    for microbatch in microbatches:
        read = microbatch.fields["now"].clone().requires_grad_()
        critic, critic_metrics = CriticLoss(config.values, size.denominator("token"))(read, microbatch)
        actor, metrics = ActorLoss.of(config.ppo.loss, config.ppo.loss.kl_coef, size)((read, -read), microbatch)
        (critic + actor).backward()
        assert read.grad is not None
        gradients.append(read.grad)
        for name, (total, weight) in (metrics | critic_metrics).items():
            found[name] = found.get(name, 0.0) + float(total)
            found[f"{name} weight"] = found.get(f"{name} weight", 0.0) + float(weight)
    rows = dict(zip(microbatches[0].sequence_index, microbatches[0].unpack(gradients[0]), strict=True))
    assert len(microbatches) == 1
    return found, share.flatten(rows.items())


@given(
    first=st.lists(TOKENS, min_size=4, max_size=4),
    kind=st.sampled_from(["clip", "dis"]),
    aggregation=st.sampled_from(["token", "sequence", "constant_length"]),
    baseline=st.sampled_from(["critic", "grpo"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_tools_tokens_change_no_number(first: list[list[bool]], kind, aggregation, baseline, seed: int) -> None:
    config = make_config(kind, aggregation, baseline)
    rollouts = [rollout_of(i, [True, *row], 1.0 if i % 3 else -1.0) for i, row in enumerate(first)]
    whole, bare = (RolloutShare.whole(part) for part in (rollouts, [without_observations(r) for r in rollouts]))
    generator, kept = torch.Generator().manual_seed(seed), whole.sampled
    noise = {name: torch.randn(whole.num_tokens, generator=generator) for name in ("old", "ref", "values", "now")}
    noise = {name: torch.where(kept, x, 1e4) for name, x in noise.items()}
    bare_noise = {name: x[kept] for name, x in noise.items()}
    assert bare.batch.lengths.tolist() == whole.batch.sampled_lengths.tolist()

    found, expected = (
        advantages_of(config, share, outputs_of(share, x)) for share, x in ((whole, noise), (bare, bare_noise))
    )
    for name in ("advantages", "returns"):
        assert torch.equal(getattr(found, name)[kept], getattr(expected, name)), name
        assert not getattr(found, name)[~kept].any()
    assert found.mask.equal(kept) and found.profiles.keys() == expected.profiles.keys()
    assert all(found.profiles[name] == pytest.approx(profile, abs=1e-9) for name, profile in expected.profiles.items())
    of_lengths = length_statistics(whole.batch.lengths, whole.batch.truncated).keys()
    metrics = {name: number for name, number in found.metrics.items() if name not in of_lengths}
    share = metrics.pop("rollout/observed_share", 0.0)
    assert abs(share - float((~kept).float().mean())) < 1e-6
    expected_metrics = {name: number for name, number in expected.metrics.items() if name not in of_lengths}
    assert metrics == pytest.approx(expected_metrics, rel=1e-6, abs=1e-9)  # sums in another order

    losses, gradient = losses_of(config, whole, outputs_of(whole, noise), found, noise["now"])
    bare_losses, bare_gradient = losses_of(config, bare, outputs_of(bare, bare_noise), expected, bare_noise["now"])
    assert losses.keys() == bare_losses.keys()
    for name, number in bare_losses.items():
        assert abs(losses[name] - number) <= 1e-5 * max(1.0, abs(number)), name
    assert torch.allclose(gradient[kept], bare_gradient, rtol=1e-5, atol=1e-6) and not gradient[~kept].any()


def test_by_hand() -> None:
    """Sampled, two of a tool, sampled: λ 0.5, reward 1; δ_2 = 1 - 0.5 and δ_1 = 0.5 - 0.25."""
    config = Config()
    config.ppo.advantage.whiten, config.ppo.advantage.lam_actor, config.ppo.advantage.lam_critic = False, 0.5, 1.0
    share = RolloutShare.whole([rollout_of(0, [True, False, False, True], 1.0)])
    values = torch.tensor([0.25, 9.0, -9.0, 0.5])
    found = advantages_of(config, share, ModelOutputs(share.rollout_logprobs, share.rollout_logprobs, None, values))
    assert found.advantages.tolist() == [0.25 + 0.5 * 0.5, 0.0, 0.0, 0.5] and found.returns.tolist() == [1.0, 0, 0, 1.0]
    assert LossSize.of(share.batch, torch.tensor([True]), 8) == LossSize(2, 1, 2, 8)
