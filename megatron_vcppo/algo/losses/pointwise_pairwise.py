"""Losses of the reward model, which scores a response at its last token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vcppo.algo.losses.aggregation import masked_difference, weighted_loss
from megatron_vcppo.algo.metrics import Metrics, mean_metric, total_metric


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
    loss = weighted_loss(losses, last_mask, denominator, None)
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
    loss = weighted_loss(-F.logsigmoid(margin), everything, denominator, None)
    return loss, {
        "reward_model_loss": total_metric(loss),
        "accuracy": mean_metric(margin > 0, everything),
        "margin": mean_metric(margin, everything),
    }
