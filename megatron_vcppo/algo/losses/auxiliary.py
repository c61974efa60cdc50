"""What may be added to the policy loss: each term returns (loss, metrics), the caller adds them up."""

import torch
from torch import Tensor

from megatron_vcppo.algo.kl import kl_estimate
from megatron_vcppo.algo.losses.aggregation import masked_difference, weighted_loss
from megatron_vcppo.algo.metrics import Metrics, mean_metric, total_metric


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
    loss = coef * weighted_loss(-logprobs, positive_mask, denominator, None)
    return loss, {"positive_nll": mean_metric(-logprobs, positive_mask), "positive_loss": total_metric(loss)}
