"""KL estimates between policies, the adaptive coefficient, and rewards per token that carry them."""

import torch
from torch import Tensor

from megatron_vcppo.algo.masked import last_valid

# Beyond e^20 a probability ratio means no more than "far away"; the bound keeps float32 finite.
MAX_LOG_RATIO = 20.0

KL_KINDS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(actor ‖ reference) from tokens that the actor sampled; any shape, the inputs' shape.

    With d = logprobs - ref_logprobs (Schulman, "Approximating KL divergence", 2020):
    k1 = d: unbiased, may be negative; in a loss its expected gradient is zero, so use it in rewards only.
    k2 = d²/2: biased value, but in a loss its gradient is that of the KL divergence.
    k3 = e^(-d) - 1 + d: unbiased, never negative, low variance.
    """
    difference = (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    assert kind == "k3", f"KL estimate {kind!r} is none of {KL_KINDS}"
    return (-difference).expm1() + difference


def next_kl_coef(kl_coef: float, *, observed_kl: float, target_kl: float, num_rollouts: int, horizon: float) -> float:
    """The adaptive coefficient for the next iteration (Ziegler et al., arXiv 1909.08593, §2.2).

    observed_kl, target_kl: nats, of the same reduction. horizon: rollouts over which a relative error of the full 20 %
    changes the coefficient by 20 %. The number returned is the whole state: save it with the checkpoint.
    """
    error = min(max(observed_kl / target_kl - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * num_rollouts / horizon)


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
