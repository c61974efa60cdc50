"""From scored rollouts and values to advantages and critic targets: the same tensors on every rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vcppo.algo.advantages import (
    broadcast_to_tokens,
    gate_on_explained_variance,
    group_advantages,
    length_adaptive_lam,
    whiten,
)
from megatron_vcppo.algo.diagnostics import batch_diagnostics, length_statistics, summarize
from megatron_vcppo.algo.gae import decoupled_gae
from megatron_vcppo.algo.kl import filter_overlong, kl_estimate, soft_overlong_penalty, token_rewards
from megatron_vcppo.algo.masked import masked_moments
from megatron_vcppo.config import AdvantageConfig, PolicyLossConfig, ReturnsConfig
from megatron_vcppo.data.rollout_batch import ModelOutputs, RolloutBatch
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.rewards.verifier import Verdict

NUM_POSITION_BINS = 64
"""Bins of the absolute profiles, over rollout.max_tokens."""
END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class AdvantageBatch:
    """All [B, T]; 0 where ``mask`` is False."""

    mask: Tensor
    """bool: tokens that are trained on (response tokens, less what overlong filtering drops)."""
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]
    profiles: dict[str, list[float | None]]
    """Advantage and value by position, absolute and by decile of the response's length."""


def compute_advantages(
    batch: RolloutBatch,
    outputs: ModelOutputs,
    config: AdvantageConfig,
    loss: PolicyLossConfig,
    *,
    returns_config: ReturnsConfig,
    kl_coef: float,
    max_tokens: int,
    end_of_thinking_id: int | None,
) -> AdvantageBatch:
    """Decoupled GAE (VC-PPO Eq. 7-8), or a group baseline, with the configured additions.

    A response that was truncated counts as ended: its verdict is its return.

    Args:
        outputs: values None means that the baseline is the group.
        loss: says whether the KL divergence from the reference is a part of the rewards, and how it is estimated.
        returns_config: discount and penalties, which value pretraining shares.
        kl_coef: what a nat of that divergence costs.
        max_tokens: the limit of a response, over which profiles are binned and penalties reach.
        end_of_thinking_id: the token that ends the thinking; None if the model has none.
    """
    mask, values = batch.response_mask, outputs.values
    rewards = episode_rewards(batch, returns_config, max_tokens)
    kl = None
    if outputs.ref_logprobs is not None and loss.kl_in == "reward":
        kl = kl_estimate(outputs.old_logprobs, outputs.ref_logprobs, loss.kl_kind)
    lam_actor: float | Tensor = config.lam_actor
    if config.length_adaptive_alpha is not None:
        lam_actor = length_adaptive_lam(batch.lengths, config.length_adaptive_alpha)
    critic_values = torch.zeros_like(outputs.old_logprobs) if values is None else values
    advantages, returns = decoupled_gae(
        rewards=token_rewards(rewards, mask, kl, kl_coef),
        values=critic_values,
        mask=mask,
        gamma=returns_config.gamma,
        lam_actor=lam_actor,
        lam_critic=config.lam_critic,
    )
    if values is None:
        advantages = broadcast_to_tokens(group_advantages(rewards, batch.group_ids, config.baseline), mask)
    metrics, profiles = summarize(
        batch_diagnostics(
            values=critic_values,
            returns=returns,
            advantages=advantages,
            mask=mask,
            decay_actor=returns_config.gamma * lam_actor,
            decay_critic=returns_config.gamma * config.lam_critic,
            bin_width=max(1, ceil_div(max_tokens, NUM_POSITION_BINS)),
            num_bins=NUM_POSITION_BINS,
            give_up_mask=_give_up_mask(batch, end_of_thinking_id),
        )
    )
    if values is None:  # there is no critic to judge
        metrics = {name: number for name, number in metrics.items() if not name.startswith("critic/")}
        profiles = {name: profile for name, profile in profiles.items() if not name.startswith("value_")}
    elif config.explained_variance_gate:
        advantages = gate_on_explained_variance(
            advantages,
            returns=returns,
            mask=mask,
            explained_variance=metrics["critic/explained_variance"],
            mean_return=float(returns[mask].mean()),
        )
    trained = trained_mask(batch, returns_config)
    if config.whiten:
        advantages = whiten(advantages, trained, masked_moments(advantages, trained))
    metrics |= length_statistics(batch.lengths, batch.truncated) | reward_statistics(batch)
    if kl is not None:
        metrics["actor/kl_ref"] = float(kl[mask].mean())
    metrics["rollout/logprob_gap"] = float((outputs.old_logprobs - batch.rollout_logprobs)[mask].abs().mean())
    return AdvantageBatch(trained, advantages.masked_fill(~trained, 0.0), returns, metrics, profiles)


def episode_rewards(batch: RolloutBatch, config: ReturnsConfig, max_tokens: int) -> Tensor:
    """What the critic's returns are made of, in pretraining as in PPO: verdicts and the penalty for length, [B]."""
    buffer = config.overlong_penalty_tokens
    if not buffer:
        return batch.rewards
    return batch.rewards + soft_overlong_penalty(batch.lengths, max_tokens, buffer)


def trained_mask(batch: RolloutBatch, config: ReturnsConfig) -> Tensor:
    """The response tokens that losses count, in pretraining as in PPO: bool [B, T]."""
    return filter_overlong(batch.response_mask, batch.truncated) if config.overlong_filter else batch.response_mask


def reward_statistics(batch: RolloutBatch) -> dict[str, float]:
    """Rewards and the share of right answers; groups in which every sample got the same; answers without a verdict."""
    rewards, groups = batch.rewards, batch.group_ids
    num_groups = int(groups.max()) + 1
    low = torch.full((num_groups,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    high = torch.full((num_groups,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    kinds = [Verdict(0.0, rollout.verdict).kind for rollout in batch.rollouts]
    return {
        "rollout/reward_mean": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std(correction=0)),
        "rollout/accuracy": float(batch.is_correct.float().mean()),
        "rollout/equal_groups": float((low == high).float().mean()),
        "rollout/verifier_timeouts": float(kinds.count("timeout")),
        "rollout/verifier_errors": float(kinds.count("error")),
    }


def _give_up_mask(batch: RolloutBatch, end_of_thinking_id: int | None) -> Tensor | None:
    """Where wrong responses end their thinking; None if the model has no such token."""
    if end_of_thinking_id is None:
        return None
    found = torch.zeros_like(batch.response_mask)
    for row, rollout in enumerate(batch.rollouts):
        if not rollout.is_correct and end_of_thinking_id in rollout.response_ids:
            found[row, rollout.response_ids.index(end_of_thinking_id)] = True
    return found
