"""How token losses become one number: weights per token and a denominator for the whole batch."""

import torch
from torch import Tensor

AGGREGATIONS = ("token", "sequence", "constant_length")


def token_weights(mask: Tensor, aggregation: str) -> Tensor:
    """float32 [B, T], 0 where masked; computed on whole rows, then packed like any other field.

    token: every valid token counts the same (VAPO Eq. 7, DAPO). sequence: every response counts the same, as the mean
    over its tokens (GRPO). constant_length: tokens count the same, see ``loss_denominator``. mask: bool [B, T].
    """
    assert aggregation in AGGREGATIONS, f"aggregation {aggregation!r} is none of {AGGREGATIONS}"
    if aggregation != "sequence":
        return mask.float()
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def loss_denominator(aggregation: str, num_tokens: int, num_sequences: int, max_length: int) -> int:
    """What the weighted sum is divided by; all counts are of the whole batch (minibatch), over every rank.

    num_tokens: valid tokens. num_sequences: rows with at least one. max_length: the longest response that sampling
    allows; constant_length divides by sequences × max_length, so that no response's length changes the weight of
    its tokens or of another's (Dr. GRPO, arXiv 2503.20783).
    """
    denominators = {
        "token": num_tokens,
        "sequence": num_sequences,
        "constant_length": num_sequences * max_length,
    }
    return denominators[aggregation]


def weighted_loss(token_losses: Tensor, mask: Tensor, denominator: float, weights: Tensor | None = None) -> Tensor:
    """Σ weights · token_losses over valid tokens / denominator: a part's share of the batch's loss, 0-d.

    token_losses, mask, weights: one shape; weights: default 1. A denominator of 0 is allowed if nothing is valid
    (a batch without correct rollouts has no positive examples): the loss is 0 and still differentiable.
    """
    assert token_losses.shape == mask.shape, f"{tuple(token_losses.shape)} losses, {tuple(mask.shape)} mask"
    if weights is not None:
        token_losses = token_losses * weights
    total = token_losses.masked_fill(~mask, 0).sum()
    if denominator == 0:
        assert not bool(mask.any()), "the denominator is 0 but the mask has valid tokens"
        return total
    return total / denominator


def masked_difference(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a - b, 0 where masked: later operations see no NaN there, so neither do gradients.

    a, b, mask (bool): one shape, which is that of the result.
    """
    return torch.where(mask, a - b, 0.0)
