"""The GPU kernel of decoupled GAE: one program per row, which walks blocks of tokens from the right."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_WARPS = 8


def gae_rows(
    *,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam_actor: Tensor,
    lam_critic: Tensor,
    bootstrap_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """``decoupled_gae`` for tensors on a GPU, accumulated in their own precision.

    Args:
        rewards: [B, T] float32 or float64.
        values: [B, T], of the same dtype.
        mask: bool [B, T].
        gamma: discount per token.
        lam_actor: [B], of any float type.
        lam_critic: [B].
        bootstrap_values: [B], of any float type: of the states after the last valid tokens.

    What a token needs from its successor is one number, S_{t+1} = (1 - λ) V_{t+1} + λ R_{t+1}, because the λ-return is
    R_t = r_t + γ S_{t+1}. S_t = (1 - λ) V_t + λ r_t + γ λ S_{t+1} on valid tokens and S_t = S_{t+1} in gaps: an
    associative scan of the maps S → x + d S, without a search for the next valid token. After the last one S is the
    bootstrap value, for any λ.
    """
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    num_rows, num_tokens = values.shape
    if values.numel():
        _gae_rows[(num_rows,)](
            rewards,
            values,
            mask,
            lam_actor.contiguous(),
            lam_critic.contiguous(),
            bootstrap_values.contiguous(),
            advantages,
            returns,
            num_tokens,
            gamma,
            BLOCK=min(_BLOCK, triton.next_power_of_2(num_tokens)),
            num_warps=_WARPS,
        )
    return advantages, returns


@triton.jit
def _then(d_first, x_first, d_second, x_second):  # type: ignore[no-untyped-def]
    """The map of ``first`` and then of ``second``; S → x + d S."""
    return d_first * d_second, x_second + d_second * x_first


@triton.jit
def _gae_rows(  # type: ignore[no-untyped-def]
    rewards, values, mask, lam_actor, lam_critic, bootstrap_values, advantages, returns, num_tokens, gamma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    offset = row.to(tl.int64) * num_tokens
    dtype: tl.constexpr = values.dtype.element_ty
    actor, critic = tl.load(lam_actor + row).to(dtype), tl.load(lam_critic + row).to(dtype)
    state_actor = tl.load(bootstrap_values + row).to(dtype)
    state_critic = state_actor
    lanes = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(num_tokens, BLOCK) - 1, -1, -1):
        t = block * BLOCK + lanes
        # Lane t scans its successor, so that it ends with S_{t+1}. The second load of a token comes from the cache.
        after = t + 1 < num_tokens
        valid = tl.load(mask + offset + t + 1, after, other=0) != 0
        r = tl.load(rewards + offset + t + 1, valid, other=0.0)
        v = tl.load(values + offset + t + 1, valid, other=0.0)
        d_actor = tl.where(valid, gamma * actor, 1.0).to(dtype)
        d_critic = tl.where(valid, gamma * critic, 1.0).to(dtype)
        d_actor, x_actor = tl.associative_scan((d_actor, v + actor * (r - v)), 0, _then, reverse=True)
        d_critic, x_critic = tl.associative_scan((d_critic, v + critic * (r - v)), 0, _then, reverse=True)
        next_actor = x_actor + d_actor * state_actor
        next_critic = x_critic + d_critic * state_critic
        state_actor = tl.sum(tl.where(lanes == 0, next_actor, 0.0), axis=0)
        state_critic = tl.sum(tl.where(lanes == 0, next_critic, 0.0), axis=0)

        here = t < num_tokens
        valid = tl.load(mask + offset + t, here, other=0) != 0
        r = tl.load(rewards + offset + t, valid, other=0.0)
        v = tl.load(values + offset + t, valid, other=0.0)
        tl.store(advantages + offset + t, tl.where(valid, r + gamma * next_actor - v, 0.0), here)
        tl.store(returns + offset + t, tl.where(valid, r + gamma * next_critic, 0.0), here)
