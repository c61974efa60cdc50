"""The actor's losses: the clipped surrogate (PPO, arXiv 1707.06347, Eq. 7) with the changes for long reasoning, and
what may be added to it. Each term returns (loss, metrics); the caller adds them up."""

import torch
from torch import Tensor

from megatron_vcppo.algo.kl import MAX_LOG_RATIO, kl_estimate
from megatron_vcppo.algo.losses.aggregation import masked_difference, weighted_loss
from megatron_vcppo.algo.metrics import Metrics, mean_metric, moment_metrics, total_metric


def policy_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    tis_cap: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Σ w_t ℓ_t / denominator, with ratio = π/π_old and

        ℓ = max(-A · ratio, -A · clip(ratio, 1 - clip_low, 1 + clip_high))

    Args:
        logprobs: [B, T] or packed [N], of the current actor; gets the gradient.
        old_logprobs: of the actor before the update, the same shape.
        advantages: the same shape.
        mask: bool, the same shape.
        denominator: see ``aggregation``.
        clip_low: the ratio may fall to 1 - clip_low before its gradient is cut off.
        clip_high: the ratio may rise to 1 + clip_high; 0.2 and 0.28 are clip-higher (VAPO Eq. 8).
        dual_clip: c > 1 bounds the loss of negative advantages, ℓ ≤ -A · c (arXiv 1912.09729); default: off.
        weights: see ``aggregation``, the same shape; default: 1.
        rollout_logprobs: the sampler's, the same shape.
        tis_cap: with rollout_logprobs, ℓ is multiplied by min(π_old / π_rollout, tis_cap), without gradient: truncated
            importance sampling for a sampler whose numerics differ from the trainer's; default: off.

    Deviation: log-ratios are bounded to ±20.

    Returns the loss, 0-d, and the metrics policy_loss, clip_fraction (tokens whose gradient the clip removed), ratio
    and its square, approx_kl (k3 estimate of KL(π_old ‖ π)); with the options, dual_clip_fraction, logprob_gap (mean
    |old - rollout|), tis_weight, tis_capped.
    """
    advantages = advantages.masked_fill(~mask, 0.0)
    log_ratio = masked_difference(logprobs, old_logprobs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    metrics: Metrics = {
        "clip_fraction": mean_metric(clipped > unclipped, mask),
        **moment_metrics("ratio", ratio, mask),
        "approx_kl": mean_metric(log_ratio.expm1() - log_ratio, mask),
    }
    if dual_clip is not None:
        ceiling = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        metrics["dual_clip_fraction"] = mean_metric(losses > ceiling, mask)
        losses = torch.minimum(losses, ceiling)
    if rollout_logprobs is not None:
        gap = masked_difference(old_logprobs, rollout_logprobs, mask).detach()
        metrics["logprob_gap"] = mean_metric(gap.abs(), mask)
        if tis_cap is not None:
            importance = gap.clamp(max=MAX_LOG_RATIO).exp()
            metrics["tis_weight"] = mean_metric(importance.clamp(max=tis_cap), mask)
            metrics["tis_capped"] = mean_metric(importance > tis_cap, mask)
            losses = losses * importance.clamp(max=tis_cap)
    loss = weighted_loss(losses, mask, denominator, weights)
    return loss, {"policy_loss": total_metric(loss), **metrics}


def dis_loss(
    logprobs: Tensor,
    *,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Double-sided importance sampling (SAO, arXiv 2607.07508): Σ w_t ℓ_t / denominator, with ratio = π/π_rollout,

        ℓ = -A · ratio where 1 - clip_low ≤ ratio ≤ 1 + clip_high, else 0, without gradient

    so that a token that either the updates or the engines' numerics and age moved far, in either direction and whatever
    its advantage, teaches nothing. Other arguments as in ``policy_loss``, also its bound of log-ratios.

    Returns the loss, 0-d, and the metrics policy_loss, dis_masked_low and dis_masked_high (share of tokens below and
    above), ratio and its square, approx_kl (k3 estimate of KL(π_rollout ‖ π)).
    """
    advantages = advantages.masked_fill(~mask, 0.0)
    log_ratio = masked_difference(logprobs, rollout_logprobs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    low, high = ratio < 1.0 - clip_low, ratio > 1.0 + clip_high
    loss = weighted_loss((-advantages * ratio).masked_fill(low | high, 0.0), mask, denominator, weights)
    return loss, {
        "policy_loss": total_metric(loss),
        "dis_masked_low": mean_metric(low, mask),
        "dis_masked_high": mean_metric(high, mask),
        **moment_metrics("ratio", ratio, mask),
        "approx_kl": mean_metric(log_ratio.expm1() - log_ratio, mask),
    }


def entropy_bonus(
    entropy: Tensor,
    mask: Tensor,
    *,
    coef: float,
    denominator: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """-coef · Σ w H / denominator: rewards spread-out distributions. entropy: nats per token, [B, T] or [N].

    With coef 0 the term only reports the metric, entropy, and has no gradient. Other arguments as in ``policy_loss``.
    """
    loss = -coef * weighted_loss(entropy if coef else entropy.detach(), mask, denominator, weights)
    return loss, {"entropy": mean_metric(entropy, mask)}


def kl_loss(
    logprobs: Tensor,
    *,
    ref_logprobs: Tensor,
    mask: Tensor,
    coef: float,
    kind: str,
    denominator: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """coef · Σ w KL / denominator, with the estimate ``kind`` of ``kl_estimate`` (read there which has which gradient).

    Args:
        logprobs: [B, T] or [N], the actor's; gets the gradient.
        ref_logprobs: the reference's, the same shape.
        mask: bool, the same shape.
        coef: nats to loss.
        kind: k1 | k2 | k3.
        denominator: see ``aggregation``.
        weights: see ``aggregation``, the same shape; default: 1.

    Returns the loss, 0-d, and the metric kl_ref, in nats per token.
    """
    difference = masked_difference(logprobs, ref_logprobs.detach(), mask)
    kl = kl_estimate(difference, torch.zeros_like(difference), kind)
    return coef * weighted_loss(kl, mask, denominator, weights), {"kl_ref": mean_metric(kl, mask)}


def positive_lm_loss(
    logprobs: Tensor, positive_mask: Tensor, *, coef: float, denominator: float
) -> tuple[Tensor, Metrics]:
    """coef · -Σ log π / denominator over the tokens of correct rollouts (VAPO Eq. 9-10; coef μ = 0.1 there).

    logprobs: [B, T] or [N]; positive_mask: bool, the same shape, valid tokens of correct rollouts; denominator: their
    number in the whole batch, which may be 0. Metrics: positive_nll (nats per such token), positive_loss.
    """
    loss = coef * weighted_loss(-logprobs, positive_mask, denominator)
    return loss, {"positive_nll": mean_metric(-logprobs, positive_mask), "positive_loss": total_metric(loss)}
