"""Responses that the engines sampled from a policy too far from the trainer's: they teach the actor nothing."""

import torch
from torch import Tensor

from megatron_vcppo.algo.losses.aggregation import masked_difference


@torch.no_grad()
def logprob_errors(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean |old - rollout| over the valid tokens of each row, in nats per token: float64 [B]; 0 for an empty row.

    Args:
        old_logprobs: [B, T], of the actor before the update, as the trainer computes them.
        rollout_logprobs: [B, T], as the engines reported them when they sampled.
        mask: bool [B, T].
    """
    gap = masked_difference(old_logprobs, rollout_logprobs, mask).abs().double()
    return gap.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
