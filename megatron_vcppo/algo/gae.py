"""Decoupled generalized advantage estimation (VC-PPO, arXiv 2503.01491, Eq. 7-8), for long responses and gaps."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Below this many tokens, starting threads costs more than the kernel.
_TOKENS_PER_THREAD = 1 << 18


@torch.no_grad()
def decoupled_gae(
    *,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam_actor: float | Tensor,
    lam_critic: float | Tensor,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages with λ_actor and critic targets with λ_critic, in one pass.

    With k running over the *valid* tokens of a row (gaps are skipped, whatever they hold); after the last one V = 0, or
    the row's bootstrap value, and A = 0:

        δ_k = r_k + γ V_{k+1} - V_k        A_k(λ) = δ_k + γ λ A_{k+1}(λ)
        advantages = A(lam_actor)          returns = A(lam_critic) + V

    Args:
        rewards: [B, T] float32 or float64; half precision is raised to float32.
        values: [B, T], dtypes as for rewards; values[b, t] is the value of the state in which token t is chosen.
        mask: bool [B, T], True on response tokens.
        gamma: discount per token.
        lam_actor: λ of the advantages, a number or [B] (length-adaptive λ).
        lam_critic: λ of the critic's targets, a number or [B].
        bootstrap_values: [B], values of the states after the last valid tokens (``bootstrap_of_unfinished``).
            Default: 0, the episodes end there.

    Returns (advantages, returns) [B, T], 0 where masked. No gradient flows.

    On the CPU each output is accumulated in float64 and rounded once. On a GPU the same recursion is a scan in the
    inputs' own precision.
    """
    assert rewards.ndim == 2, f"rewards must be [B, T], not {tuple(rewards.shape)}"
    assert rewards.shape == values.shape == mask.shape, (
        f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and mask {tuple(mask.shape)} differ"
    )
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}, not bool"
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = rewards.detach().to(dtype), values.detach().to(dtype)
    run = _gae_cpu if rewards.device.type == "cpu" else _gae_gpu
    return run(
        rewards=rewards,
        values=values,
        mask=mask,
        gamma=gamma,
        lam_actor=_per_row(lam_actor, values),
        lam_critic=_per_row(lam_critic, values),
        bootstrap_values=_per_row(0.0 if bootstrap_values is None else bootstrap_values.detach(), values),
    )


def _per_row(x: float | Tensor, values: Tensor) -> Tensor:
    """A number per row as float64 [B] on the device of ``values``."""
    if not isinstance(x, Tensor):  # filled there: a copy to a GPU would wait for it
        return torch.full((len(values),), x, dtype=torch.float64, device=values.device)
    assert x.ndim == 0 or x.shape == values.shape[:1], f"λ must be a number or [B], not {tuple(x.shape)}"
    return x.to(values.device, torch.float64).expand(len(values))


def _gae_gpu(**arguments: Any) -> tuple[Tensor, Tensor]:
    from megatron_vcppo.algo.gae_kernel_gpu import gae_rows

    return gae_rows(**arguments)


def _gae_cpu(
    *,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam_actor: Tensor,
    lam_critic: Tensor,
    bootstrap_values: Tensor,
) -> tuple[Tensor, Tensor]:
    # Imported here: it brings in a compiler, which ranks on GPUs do not need.
    from megatron_vcppo.algo.gae_kernel_cpu import gae_rows

    advantages, returns = (torch.empty(values.shape, dtype=values.dtype) for _ in range(2))
    inputs = (rewards, values, mask, lam_actor, lam_critic, bootstrap_values)
    by_row = [x.contiguous().numpy() for x in (*inputs, advantages, returns)]
    num_threads = min(torch.get_num_threads(), len(values), values.numel() // _TOKENS_PER_THREAD)
    if num_threads <= 1:
        gae_rows(float(gamma), *by_row)
        return advantages, returns
    # Four blocks per thread even out rows of different lengths.
    num_blocks = min(4 * num_threads, len(values))
    borders = [len(values) * i // num_blocks for i in range(num_blocks + 1)]
    with ThreadPoolExecutor(num_threads) as pool:
        blocks = (slice(first, end) for first, end in pairwise(borders))
        list(pool.map(lambda rows: gae_rows(float(gamma), *(x[rows] for x in by_row)), blocks))
    return advantages, returns


@torch.no_grad()
def gae_reference(
    *,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam_actor: float | Tensor,
    lam_critic: float | Tensor,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: the definition of ``decoupled_gae``, token by token in Python floats. Returns float64 [B, T] twice.

    Arguments as there.
    """
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    lams = torch.stack((_per_row(lam_actor, values), _per_row(lam_critic, values)), dim=1).tolist()
    for row, (row_rewards, row_values) in enumerate(zip(rewards.tolist(), values.tolist(), strict=True)):
        next_value, running = 0.0 if bootstrap_values is None else float(bootstrap_values[row]), [0.0, 0.0]
        for t in reversed(mask[row].nonzero().flatten().tolist()):
            td_error = row_rewards[t] + gamma * next_value - row_values[t]
            running = [td_error + gamma * lam * after for lam, after in zip(lams[row], running, strict=True)]
            advantages[row, t], returns[row, t] = running[0], running[1] + row_values[t]
            next_value = row_values[t]
    return advantages, returns
