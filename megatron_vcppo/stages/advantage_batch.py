"""From scored rollouts and values to advantages and critic targets.

Each replica works on its share of the rollouts; what is a property of the batch comes from sums over the replicas.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vcppo.algo.advantages import (
    bootstrap_of_unfinished,
    broadcast_to_tokens,
    gate_on_explained_variance,
    group_advantages,
    length_adaptive_lam,
    whiten,
)
from megatron_vcppo.algo.diagnostics import batch_diagnostics, length_statistics, summarize
from megatron_vcppo.algo.gae import decoupled_gae
from megatron_vcppo.algo.kl import kl_estimate, soft_overlong_penalty, token_rewards
from megatron_vcppo.algo.masked import first_of_row, masked_moments
from megatron_vcppo.algo.metrics import Metrics, add, add_over, means
from megatron_vcppo.algo.sequence_mask import logprob_errors
from megatron_vcppo.config import AdvantageConfig, PolicyLossConfig, ReturnsConfig
from megatron_vcppo.data.rollout_share import ModelOutputs, RolloutShare, RolloutTable
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.mcore.runtime import sum_over_replicas

NUM_POSITION_BINS = 64
"""Bins of the absolute profiles, over rollout.max_tokens."""
END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class AdvantageBatch:
    """Of a replica's share of the batch; all [N], response tokens; 0 where ``mask`` is False."""

    mask: Tensor
    """bool: tokens that the actor is trained on (sampled tokens, less what overlong filtering drops and what iterations
    before have trained on)."""
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]
    """Of the whole batch."""
    profiles: dict[str, list[float | None]]
    """Advantage and value by position, absolute and by decile of the response's length; of the whole batch."""


def compute_advantages(
    share: RolloutShare,
    outputs: ModelOutputs,
    config: AdvantageConfig,
    loss: PolicyLossConfig,
    *,
    returns_config: ReturnsConfig,
    kl_coef: float,
    max_tokens: int,
    end_of_thinking_id: int | None,
    total: Callable[[Tensor], Tensor] = sum_over_replicas,
) -> AdvantageBatch:
    """Decoupled GAE (VC-PPO Eq. 7-8), or a group baseline, with the configured additions; collective over replicas.

    A response that was truncated counts as ended: its verdict is its return. One that is continued in the next
    iteration has no reward but a bootstrap value; diagnostics and statistics are those of finished responses. Tokens
    that a tool wrote are stepped over: the value after a sampled token is that of the next sampled one.

    Args:
        outputs: values None means that the baseline is the group.
        loss: says whether the KL divergence from the reference is a part of the rewards, and how it is estimated.
        returns_config: discount and penalties, which value pretraining shares.
        kl_coef: what a nat of that divergence costs.
        max_tokens: the limit of a response, over which profiles are binned and penalties reach.
        end_of_thinking_id: the token that ends the thinking; None if the model has none.
        total: sums a float64 [n] over the replicas.
    """
    batch, own = share.batch, share.rows
    rewards = episode_rewards(batch, returns_config, max_tokens)
    group_baseline = outputs.values is None
    if group_baseline:
        over_others = group_advantages(rewards, batch.group_ids, config.baseline)[own]
    rewards = rewards[own]
    values = torch.zeros(share.num_tokens) if outputs.values is None else outputs.values
    kl = None
    if outputs.ref_logprobs is not None and loss.kl_in == "reward":
        kl = kl_estimate(outputs.policy_logprobs, outputs.ref_logprobs, loss.kl_kind)
    lam_actor: float | Tensor = config.lam_actor
    if config.length_adaptive_alpha is not None:
        lam_actor = length_adaptive_lam(share.table.sampled_lengths, config.length_adaptive_alpha)
    unfinished = share.table.unfinished
    gave_up = None if end_of_thinking_id is None else (share.response_ids == end_of_thinking_id) & share.sampled
    advantages, returns = torch.empty(share.num_tokens), torch.empty(share.num_tokens)
    parts: list[Metrics] = []
    for block in share.blocks():
        mask, block_values = block.sampled, block.pad(values)
        block_kl = None if kl is None else block.pad(kl)
        lam = lam_actor[block.rows] if isinstance(lam_actor, Tensor) else lam_actor
        block_rewards = token_rewards(rewards[block.rows], mask, block_kl, kl_coef)
        block_advantages, block_returns = decoupled_gae(
            rewards=block_rewards,
            values=block_values,
            mask=mask,
            gamma=returns_config.gamma,
            lam_actor=lam,
            lam_critic=config.lam_critic,
            bootstrap_values=bootstrap_of_unfinished(block_values, mask, unfinished[block.rows]),
        )
        mc_returns = block_returns
        if config.lam_critic != 1.0 and not group_baseline:
            _, mc_returns = decoupled_gae(
                rewards=block_rewards,
                values=torch.zeros_like(block_rewards),
                mask=mask,
                gamma=returns_config.gamma,
                lam_actor=1.0,
                lam_critic=1.0,
            )
        if group_baseline:
            block_advantages = broadcast_to_tokens(over_others[block.rows], mask)
        advantages[block.tokens], returns[block.tokens] = block_advantages[block.mask], block_returns[block.mask]
        wrong = ~share.table.is_correct[block.rows]
        part = batch_diagnostics(
            values=block_values,
            returns=block_returns,
            advantages=block_advantages,
            mask=mask & ~unfinished[block.rows, None],
            decay_actor=returns_config.gamma * lam,
            decay_critic=returns_config.gamma * config.lam_critic,
            bin_width=max(1, ceil_div(max_tokens, NUM_POSITION_BINS)),
            num_bins=NUM_POSITION_BINS,
            give_up_mask=None if gave_up is None else first_of_row(block.pad(gave_up)) & wrong[:, None],
            mc_returns=mc_returns,
        )
        parts.append(part)
    summed = add_over(add(parts) | _token_means(outputs, kl, share.sampled & share.is_new), total)
    per_token: Metrics = {name: summed.pop(name) for name in ("rollout/logprob_gap", "actor/kl_ref") if name in summed}
    finished = batch.take((~batch.unfinished).nonzero().flatten().numpy())
    metrics, profiles = summarize(summed) if len(finished) else ({}, {})
    if group_baseline:  # there is no critic to judge
        metrics = {name: number for name, number in metrics.items() if not name.startswith("critic/")}
        profiles = {name: profile for name, profile in profiles.items() if not name.startswith("value_")}
    elif config.explained_variance_gate:
        advantages = gate_on_explained_variance(
            advantages,
            returns=returns,
            mask=share.sampled,
            explained_variance=metrics["critic/explained_variance"],
            mean_return=metrics["critic/return_mean"],
        )
    trained = share.per_token(trained_rollouts(batch, returns_config)[own]) & share.sampled & share.is_new
    if config.whiten:
        pieces = [block.tokens for block in share.blocks()]
        moments = total(torch.stack([masked_moments(advantages[x], trained[x]) for x in pieces]).sum(dim=0))
        for x in pieces:
            advantages[x] = whiten(advantages[x], trained[x], moments)
    if loss.max_logprob_error is not None:
        metrics |= drop_far_responses(advantages, share, outputs, trained, loss.max_logprob_error, total)
    if len(finished):
        metrics |= length_statistics(finished.lengths, finished.truncated) | reward_statistics(finished)
    if batch.has_windows:
        metrics |= window_statistics(batch)
    if batch.has_observations:
        metrics["rollout/observed_share"] = 1.0 - float(batch.sampled_lengths.sum() / batch.lengths.sum())
    metrics |= {name: float(mean) for name, mean in means(per_token).items()}
    return AdvantageBatch(trained, advantages.masked_fill_(~trained, 0.0), returns, metrics, profiles)


def drop_far_responses(
    advantages: Tensor,
    share: RolloutShare,
    outputs: ModelOutputs,
    trained: Tensor,
    limit: float,
    total: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Set the advantages [N] of responses to 0 whose log-probs differ by more than ``limit`` from the engines' (see
    ``logprob_errors``); with that the policy loss has no gradient there. Metrics: the share of responses and tokens.

    trained: bool [N], the tokens that are trained on. total: sums a float64 [n] over the replicas.
    """
    assert outputs.old_logprobs is not None, "checked with the configuration"
    counts = torch.zeros(4, dtype=torch.float64)
    for block in share.blocks():
        mask = block.pad(trained)
        errors = logprob_errors(block.pad(outputs.old_logprobs), block.pad(outputs.rollout_logprobs), mask)
        far = (errors > limit)[:, None] & mask
        advantages[block.tokens] = advantages[block.tokens].masked_fill(far[block.mask], 0.0)
        counts += torch.stack((far.any(dim=1).sum(), mask.any(dim=1).sum(), far.sum(), mask.sum()))
    responses, num_responses, tokens, num_tokens = total(counts).tolist()
    return {
        "actor/dropped_responses": responses / max(1.0, num_responses),
        "actor/dropped_tokens": tokens / max(1.0, num_tokens),
    }


def _token_means(outputs: ModelOutputs, kl: Tensor | None, sampled: Tensor) -> Metrics:
    """How far the engines' log-probs are off, and the KL divergence from the reference, if it is in the rewards.

    Over the tokens that were ``sampled``, bool [N], since the last iteration.
    """
    old = outputs.old_logprobs
    gap = None if old is None else (old - outputs.rollout_logprobs).abs_()
    found = {"rollout/logprob_gap": gap, "actor/kl_ref": kl}
    return {
        name: (x.masked_fill(~sampled, 0.0).sum(dtype=torch.float64), sampled.sum().double())
        for name, x in found.items()
        if x is not None
    }


def episode_rewards(batch: RolloutTable, config: ReturnsConfig, max_tokens: int) -> Tensor:
    """What the critic's returns are made of, in pretraining as in PPO: verdicts and the penalty for length, [B]; 0 of
    unfinished responses."""
    buffer = config.overlong_penalty_tokens
    if not buffer:
        return batch.rewards
    penalty = soft_overlong_penalty(batch.lengths, max_tokens, buffer)
    return batch.rewards + penalty.masked_fill(batch.unfinished, 0.0)


def trained_rollouts(batch: RolloutTable, config: ReturnsConfig) -> Tensor:
    """The rollouts that losses count, in pretraining as in PPO: bool [B]."""
    return ~batch.truncated if config.overlong_filter else torch.ones(len(batch), dtype=torch.bool)


def window_statistics(batch: RolloutTable) -> dict[str, float]:
    """Of responses in windows: the shares of the batch that are unfinished, and that are continued from iterations
    before; the share of its response tokens that the actor was trained on then."""
    return {
        "rollout/unfinished_share": float(batch.unfinished.double().mean()),
        "rollout/continued_share": float((batch.rows["trained_length"] > 0).mean()),
        "rollout/trained_before_share": 1.0 - float(batch.new_lengths.sum() / batch.sampled_lengths.sum()),
    }


def reward_statistics(batch: RolloutTable) -> dict[str, float]:
    """Rewards and the share of right answers; groups in which every sample got the same; answers without a verdict."""
    rewards, groups = batch.rewards, batch.group_ids
    num_groups = int(groups.max()) + 1
    low = torch.full((num_groups,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    high = torch.full((num_groups,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    return {
        "rollout/reward_mean": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std(correction=0)),
        "rollout/accuracy": float(batch.is_correct.float().mean()),
        "rollout/equal_groups": float((low == high).float().mean()),
        "rollout/verifier_timeouts": float(batch.num_verdicts("timeout")),
        "rollout/verifier_errors": float(batch.num_verdicts("error")),
    }
