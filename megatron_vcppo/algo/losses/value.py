"""Losses of models with a scalar head: the critic's regression on returns, and the reward model's, which scores a
response at its last token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vcppo.algo.losses.aggregation import masked_difference, weighted_loss
from megatron_vcppo.algo.metrics import Metrics, mean_metric, moment_metrics, total_metric


def value_loss(
    values: Tensor,
    *,
    returns: Tensor,
    mask: Tensor,
    denominator: float,
    old_values: Tensor | None = None,
    value_clip: float | None = None,
    huber_delta: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Σ w ½(V - R)² / denominator (VC-PPO, Algorithm 1).

    Args:
        values: [B, T] or packed [N]; gets the gradient.
        returns: the critic's targets, the same shape.
        mask: bool, the same shape.
        denominator: see ``aggregation``.
        old_values: the critic's values before the update, the same shape; needed with value_clip.
        value_clip: c takes the larger of the losses at V and at old + clip(V - old, ±c), as in the PPO code; the paper
            shows none. Default: off.
        huber_delta: δ makes the loss linear beyond |V - R| = δ: δ(|e| - δ/2). Default: off.

    Returns the loss, 0-d, and the metrics value_loss; values, returns and value_errors (returns - values) with their
    squares, from whose means ``metrics.explained_variance`` follows; with value_clip, value_clip_fraction.
    """
    assert (value_clip is None) == (old_values is None), "value clipping needs both value_clip and old_values"
    errors = masked_difference(values, returns, mask)
    losses = _regression(errors, huber_delta)
    metrics = {
        **moment_metrics("values", values, mask),
        **moment_metrics("returns", returns, mask),
        **moment_metrics("value_errors", -errors, mask),
    }
    if value_clip is not None and old_values is not None:
        moved = masked_difference(values, old_values, mask).clamp(-value_clip, value_clip)
        clipped = _regression(masked_difference(old_values, returns, mask) + moved, huber_delta)
        metrics["value_clip_fraction"] = mean_metric(clipped > losses, mask)
        losses = torch.maximum(losses, clipped)
    loss = weighted_loss(losses, mask, denominator)
    return loss, {"value_loss": total_metric(loss), **metrics}


def bound_values(raw: Tensor, low: float, high: float) -> Tensor:
    """A smooth map of the critic's output into (low, high), the range of rewards (bounded values: BPCO, 2608.23566).

    middle + half · tanh((raw - middle) / half): slope 1 in the middle, so a pretrained critic keeps its values there.
    Apply it wherever values are read: before GAE and before the loss. Any shape.
    """
    assert low < high, f"values cannot be bounded to ({low}, {high})"
    middle, half = (low + high) / 2, (high - low) / 2
    return middle + half * torch.tanh((raw - middle) / half)


def _regression(errors: Tensor, huber_delta: float | None) -> Tensor:
    if huber_delta is None:
        return 0.5 * errors.square()
    size = errors.abs()
    # Quadratic in the part up to δ, linear in the rest.
    inner = size.clamp(max=huber_delta)
    return 0.5 * inner.square() + huber_delta * (size - inner)


def pointwise_loss(
    scores: Tensor,
    *,
    labels: Tensor,
    last_mask: Tensor,
    kind: str,
    denominator: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Regression on, or classification of, single responses: Σ over responses / denominator.

    Args:
        scores: [B, T] or packed [N]; gets the gradient.
        labels: the same shape.
        last_mask: bool, the same shape: the last token of each response (``masked.last_valid``), which is all that is
            read of scores and labels.
        kind: mse: ½(score - label)²; bce: the score is the logit of "good" and labels lie in [0, 1].
        denominator: responses in the whole batch.
        label_smoothing: s moves the labels of bce to s + (1 - 2s) · label, which keeps the scores finite.

    Returns the loss, 0-d, and the metrics reward_model_loss, accuracy (the score lies on the label's side of the
    middle: 0 of the logit for bce, and the label's sign for mse), score.
    """
    if kind == "mse":
        losses = 0.5 * masked_difference(scores, labels, last_mask).square()
        good = labels > 0
    else:
        assert kind == "bce", f"pointwise loss {kind!r} is neither mse nor bce"
        targets = label_smoothing + (1.0 - 2.0 * label_smoothing) * labels.masked_fill(~last_mask, 0.5)
        losses = F.binary_cross_entropy_with_logits(
            scores.masked_fill(~last_mask, 0.0), targets.to(scores.dtype), reduction="none"
        )
        good = labels > 0.5
    loss = weighted_loss(losses, last_mask, denominator)
    return loss, {
        "reward_model_loss": total_metric(loss),
        "accuracy": mean_metric((scores > 0) == good, last_mask),
        "score": mean_metric(scores, last_mask),
    }


def pairwise_loss(*, chosen: Tensor, rejected: Tensor, denominator: float) -> tuple[Tensor, Metrics]:
    """-Σ log σ(chosen - rejected) / denominator (Bradley–Terry; arXiv 2203.02155, Eq. 1).

    chosen, rejected: [P], the scores at the last tokens of the two responses of each pair, so both must be in one
    micro-batch; denominator: pairs in the whole batch. Metrics: reward_model_loss, accuracy, margin.
    """
    everything = torch.ones_like(chosen, dtype=torch.bool)
    margin = chosen - rejected
    loss = weighted_loss(-F.logsigmoid(margin), everything, denominator)
    return loss, {
        "reward_model_loss": total_metric(loss),
        "accuracy": mean_metric(margin > 0, everything),
        "margin": mean_metric(margin, everything),
    }
