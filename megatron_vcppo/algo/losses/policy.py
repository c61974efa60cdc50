"""The clipped surrogate (PPO, arXiv 1707.06347, Eq. 7) with the changes that long reasoning asked for."""

import torch
from torch import Tensor

from megatron_vcppo.algo.kl import MAX_LOG_RATIO
from megatron_vcppo.algo.losses.aggregation import masked_difference, weighted_loss
from megatron_vcppo.algo.masked import check_finite
from megatron_vcppo.algo.metrics import Metrics, mean_metric, moment_metrics, total_metric


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    denominator: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    tis_cap: float | None = None,
    check: bool = True,
) -> tuple[Tensor, Metrics]:
    """Σ w_t ℓ_t / denominator, with ratio = π/π_old and

        ℓ = max(-A · ratio, -A · clip(ratio, 1 - clip_low, 1 + clip_high))

    All tensors: one shape, [B, T] or packed [N]; mask is bool; only ``logprobs`` gets a gradient.
    denominator, weights: see ``aggregation``. clip_low = 0.2, clip_high = 0.28 is clip-higher (VAPO Eq. 8).
    dual_clip: c > 1 bounds the loss of negative advantages, ℓ ≤ -A · c (arXiv 1912.09729).
    rollout_logprobs: those of the sampler; with tis_cap, ℓ is multiplied by min(π_old / π_rollout, tis_cap), without
    gradient: truncated importance sampling for a sampler whose numerics differ from the trainer's.
    check: raise FloatingPointError on NaN or inf among valid tokens.
    Deviation: log-ratios are bounded to ±20.

    Metrics: policy_loss, clip_fraction (tokens whose gradient the clip removed), ratio and its square, approx_kl
    (k3 estimate of KL(π_old ‖ π)); dual_clip_fraction; logprob_gap (mean |old - rollout|), tis_weight, tis_capped.
    """
    if check:
        check_finite(
            mask,
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            rollout_logprobs=rollout_logprobs,
            weights=weights,
        )
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
