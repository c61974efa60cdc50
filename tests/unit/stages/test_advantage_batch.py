"""From rollouts and values to advantages: the definition, what changes it, and what is reported."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vcppo.algo.gae import gae_reference
from megatron_vcppo.algo.losses.policy import policy_loss
from megatron_vcppo.config import Config
from megatron_vcppo.data.packer import Packer
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.data.rollout_share import ModelOutputs, RolloutShare
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.advantage_batch import AdvantageBatch, compute_advantages, reward_statistics
from megatron_vcppo.stages.training_losses import CriticLoss
from megatron_vcppo.stages.value_pretrain import learn_returns

LENGTHS, REWARDS = (5, 3, 8, 6), (1.0, -1.0, -1.0, 1.0)
END_OF_THINKING = 9


def make_config() -> Config:
    config = Config()
    config.rollout.max_tokens = 8
    return config


def rollouts_of(rewards: tuple[float, ...] = REWARDS) -> list[Rollout]:
    rollouts = []
    for i, (length, reward) in enumerate(zip(LENGTHS, rewards, strict=True)):
        ids = (*(3 for _ in range(length - 2)), END_OF_THINKING, 2)
        reason = "length" if length == 8 else "stop"
        prompt = Prompt(f"p{i // 2}", (1, 2), "", "", "t")
        rollouts.append(Rollout(prompt, i % 2, 0, ids, "", (-1.0,) * length, reason, 0, reward))
    return rollouts


def batch_of(rewards: tuple[float, ...] = REWARDS) -> RolloutShare:
    return RolloutShare.whole(rollouts_of(rewards))


def values_of(batch: RolloutShare) -> torch.Tensor:
    return torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(1))


def advantages_of(
    config: Config, batch: RolloutShare, values: torch.Tensor | None, ref: torch.Tensor | None = None
) -> AdvantageBatch:
    old = batch.rollout_logprobs + 0.25
    return compute_advantages(
        batch,
        ModelOutputs(old, batch.rollout_logprobs, ref, values),
        config.ppo.advantage,
        config.ppo.loss,
        returns_config=config.returns,
        kl_coef=config.ppo.loss.kl_coef,
        max_tokens=config.rollout.max_tokens,
        end_of_thinking_id=END_OF_THINKING,
        total=lambda sums: sums,
    )


def test_advantages_and_targets_have_their_own_lambda() -> None:
    config, batch = make_config(), batch_of()
    config.ppo.advantage.whiten, config.ppo.advantage.lam_actor, config.ppo.advantage.lam_critic = False, 0.9, 1.0
    values = values_of(batch)
    found = advantages_of(config, batch, values)
    (block,) = batch.blocks()
    rewards = torch.zeros(block.mask.shape)
    rewards[range(4), batch.table.lengths - 1] = batch.table.rewards
    advantages, returns = gae_reference(
        rewards=rewards, values=block.pad(values), mask=block.mask, gamma=1.0, lam_actor=0.9, lam_critic=1.0
    )
    assert torch.allclose(block.pad(found.advantages).double(), advantages, atol=1e-6)
    assert torch.allclose(block.pad(found.returns).double(), returns, atol=1e-6)
    assert torch.equal(found.returns[:5], torch.ones(5))  # Monte Carlo
    assert found.metrics["rollout/logprob_gap"] == pytest.approx(0.25)


def test_whitened_over_the_tokens_that_are_trained_on() -> None:
    config, batch = make_config(), batch_of()
    config.returns.overlong_filter = True
    found = advantages_of(config, batch, values_of(batch))
    assert found.mask.tolist() == [True] * 8 + [False] * 8 + [True] * 6
    assert float(found.advantages[8:16].abs().max()) == 0.0
    trained = found.advantages[found.mask]
    assert float(trained.mean()) == pytest.approx(0, abs=1e-6)
    assert float(trained.std(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["mean", "filtered"])
def test_a_response_far_from_the_engines_policy_has_no_gradient(kind: str) -> None:
    """The others have what they had without the limit."""
    config, batch = make_config(), batch_of()
    config.returns.overlong_filter = kind == "filtered"  # that of 8 tokens, which is far: not counted twice
    far = torch.zeros(batch.num_tokens, dtype=torch.bool)
    far[5:16] = True
    old = batch.rollout_logprobs + torch.where(far, -0.75, 0.25)
    outputs = ModelOutputs(old, batch.rollout_logprobs, None, values_of(batch))

    def gradient(limit: float | None) -> tuple[torch.Tensor, dict[str, float]]:
        config.ppo.loss.max_logprob_error = limit
        found = compute_advantages(
            batch, outputs, config.ppo.advantage, config.ppo.loss, returns_config=config.returns, kl_coef=0.0,
            max_tokens=8, end_of_thinking_id=END_OF_THINKING, total=lambda sums: sums,
        )  # fmt: skip
        logprobs = old.clone().requires_grad_()
        loss, _ = policy_loss(
            logprobs, old_logprobs=old, advantages=found.advantages, mask=found.mask, denominator=22.0,
            clip_low=0.2, clip_high=0.2,
        )  # fmt: skip
        return torch.autograd.grad(loss, logprobs)[0], found.metrics

    free, metrics = gradient(None)
    assert "actor/dropped_responses" not in metrics
    limited, metrics = gradient(0.5)
    assert torch.equal(limited, free.masked_fill(far, 0.0)) and bool((free[5:8] != 0).all())
    dropped = (2 / 4, 11 / 22) if kind == "mean" else (1 / 3, 3 / 14)
    assert (metrics["actor/dropped_responses"], metrics["actor/dropped_tokens"]) == pytest.approx(dropped)
    nearly, metrics = gradient(0.8)
    assert torch.equal(nearly, free) and metrics["actor/dropped_responses"] == 0.0


def test_group_baseline_needs_no_critic_and_reports_none() -> None:
    config, batch = make_config(), batch_of((1.0, -1.0, 1.0, 1.0))
    config.ppo.advantage.baseline, config.ppo.advantage.whiten = "grpo", False
    found = advantages_of(config, batch, None)
    std = 2**0.5
    assert found.advantages[:5].tolist() == pytest.approx([1 / std] * 5)
    assert found.advantages[5:8].tolist() == pytest.approx([-1 / std] * 3)
    assert float(found.advantages[8:].abs().max()) == 0.0
    assert not [name for name in found.metrics if name.startswith("critic/")]


def test_kl_in_the_reward_lowers_the_returns_token_by_token() -> None:
    config, batch = make_config(), batch_of()
    config.ppo.loss.kl_in, config.ppo.loss.kl_coef, config.ppo.loss.kl_kind = "reward", 0.1, "k1"
    plain = advantages_of(make_config(), batch, values_of(batch)).returns
    ref = batch.rollout_logprobs - 0.25  # KL of 0.5 per token
    returns = advantages_of(config, batch, values_of(batch), ref).returns
    assert advantages_of(config, batch, values_of(batch), ref).metrics["actor/kl_ref"] == pytest.approx(0.5)
    tokens_left = torch.arange(5, 0, -1)
    assert torch.allclose(plain[:5] - returns[:5], 0.05 * tokens_left, atol=1e-6)


def test_overlong_penalty_reaches_the_returns() -> None:
    config, batch = make_config(), batch_of()
    config.returns.overlong_penalty_tokens = 4
    returns = advantages_of(config, batch, values_of(batch)).returns
    assert returns[0] == pytest.approx(1.0 - 0.25) and returns[8] == pytest.approx(-2.0)
    assert returns[5] == pytest.approx(-1.0)


def test_a_critic_that_knows_nothing_is_gated() -> None:
    config, batch = make_config(), batch_of()
    config.ppo.advantage.explained_variance_gate, config.ppo.advantage.whiten = True, False
    found = advantages_of(config, batch, values_of(batch) * 10)
    assert found.metrics["critic/explained_variance"] < 0
    assert torch.allclose(found.advantages, found.returns - found.returns.mean())


def test_equal_rewards_and_a_constant_critic_stay_finite() -> None:
    config, batch = make_config(), batch_of((-1.0,) * 4)
    found = advantages_of(config, batch, torch.full((batch.num_tokens,), -1.0))
    assert float(found.advantages.abs().max()) == 0.0
    assert all(value == value for value in found.metrics.values()), found.metrics


def test_reward_statistics() -> None:
    assert reward_statistics(batch_of((1.0, -1.0, 1.0, 1.0)).batch) == {
        "rollout/reward_mean": 0.5,
        "rollout/reward_std": pytest.approx(0.75**0.5),
        "rollout/accuracy": 0.75,
        "rollout/equal_groups": 0.5,
        "rollout/verifier_timeouts": 0.0,
        "rollout/verifier_errors": 0.0,
    }


def in_windows(*unfinished: int) -> RolloutShare:
    """Of the four responses; the last was begun in an iteration before, in which it got two tokens."""
    rollouts = rollouts_of()
    for index in unfinished:
        rollouts[index] = replace(rollouts[index], finish_reason="window", reward=None)
    rollouts[3] = replace(rollouts[3], num_trained=2)
    return RolloutShare.whole(rollouts)


def test_statistics_are_those_of_finished_responses() -> None:
    """Of 5, 3, 8 and 6 tokens the first is unfinished."""
    config, batch = make_config(), in_windows(0)
    config.returns.overlong_penalty_tokens, config.ppo.advantage.whiten = 4, False
    values = values_of(batch)
    found, metrics = advantages_of(config, batch, values), advantages_of(config, batch, values).metrics
    assert found.mask.tolist() == [True] * 16 + [False] * 2 + [True] * 4
    assert metrics["rollout/accuracy"] == pytest.approx(1 / 3)
    assert (metrics["rollout/length_mean"], metrics["rollout/truncated_share"]) == pytest.approx((17 / 3, 1 / 3))
    assert metrics["rollout/unfinished_share"] == metrics["rollout/continued_share"] == 0.25
    assert metrics["rollout/trained_before_share"] == pytest.approx(2 / 22)
    assert torch.equal(found.returns[:5], values[4].expand(5)), "the critic's opinion, and no penalty"
    of_others = RolloutShare.whole(rollouts_of()[1:])
    expected = advantages_of(config, of_others, values[5:]).metrics
    for name in ("critic/explained_variance", "critic/value_mean", "actor/advantage_mean", "actor/terminal_share"):
        assert metrics[name] == pytest.approx(expected[name]), name


def test_a_batch_without_a_finished_response_trains_the_actor() -> None:
    found = advantages_of(make_config(), in_windows(0, 1, 2, 3), values_of(batch_of()))
    assert bool(found.advantages[found.mask].isfinite().all()) and float(found.advantages.abs().max()) > 0
    assert found.metrics["rollout/unfinished_share"] == 1.0 and not found.profiles
    assert not {"rollout/accuracy", "rollout/length_mean", "critic/explained_variance"} & found.metrics.keys()


def test_answers_without_a_verdict_are_counted() -> None:
    verdicts = ("correct", "timeout: 10 s", "error: ZeroDivisionError: division by zero", "error: it died")
    rollouts = [replace(r, verdict=verdict) for r, verdict in zip(rollouts_of(), verdicts, strict=True)]
    statistics = reward_statistics(RolloutShare.whole(rollouts).batch)
    assert (statistics["rollout/verifier_timeouts"], statistics["rollout/verifier_errors"]) == (1.0, 2.0)


def test_pretraining_learns_the_returns_that_ppo_has() -> None:
    """The penalty for length, γ and the filter of truncated responses; λ is 1 whatever PPO's is."""
    config, batch = make_config(), batch_of()
    settings = config.ppo.advantage
    config.returns.overlong_penalty_tokens, config.returns.overlong_filter, config.returns.gamma = 4, True, 0.99
    settings.lam_critic = 1.0
    ppo = advantages_of(config, batch, values_of(batch))
    settings.lam_critic = 0.5
    seen: list[PackedMicrobatch] = []

    class Recorder:
        def train_step(self, microbatches: list[PackedMicrobatch], loss: CriticLoss) -> None:
            seen.extend(microbatches)
            assert loss.denominator == int(ppo.mask.sum())

    critic: Any = Recorder()
    learn_returns(
        critic,
        batch,
        Packer(512, 1, 0, 1),
        returns_config=config.returns,
        values_config=config.values,
        max_tokens=config.rollout.max_tokens,
    )
    (microbatch,) = seen
    mask = microbatch.fields["response_mask"]
    assert torch.allclose(microbatch.fields["returns"][mask], ppo.returns[ppo.mask], atol=1e-6)
    assert int(mask.sum()) == int(ppo.mask.sum()) < batch.num_tokens
