"""The clipped surrogate (PPO, arXiv 1707.06347, Eq. 7) with the changes for long reasoning."""

import torch
from torch import Tensor

from megatron_vcppo.algo.kl import MAX_LOG_RATIO
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
