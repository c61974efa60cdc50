"""From one reward per rollout to rewards per token; penalty and filter for overlong responses."""

import torch
from torch import Tensor

from megatron_vcppo.algo.masked import last_valid


def token_rewards(rewards: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """[B, T]: the rollout's reward on its last valid token, minus kl_coef · kl on every valid token.

    rewards: [B]; mask: bool [B, T]; kl: [B, T] from ``kl_estimate``. A row without valid tokens stays 0.
    """
    terminal = torch.where(last_valid(mask), rewards[:, None], 0.0)
    if kl is None:
        return terminal
    return terminal - (kl_coef * kl).masked_fill(~mask, 0.0)


def soft_overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """[B], from 0 to -1, to be added to the rewards (DAPO, arXiv 2503.14476, Eq. 13).

    lengths: [B] response tokens. 0 up to max_length - buffer, then falling linearly to -1 at max_length.
    """
    assert 0 < buffer <= max_length, f"buffer {buffer} is not in 1 … max_length {max_length}"
    return ((max_length - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0).to(torch.get_default_dtype())


def filter_overlong(mask: Tensor, truncated: Tensor) -> Tensor:
    """The mask without the rows of truncated responses (DAPO's overlong filtering): they teach nothing.

    mask: bool [B, T]; truncated: bool [B]. Returns bool [B, T].
    """
    return mask & ~truncated[:, None]
