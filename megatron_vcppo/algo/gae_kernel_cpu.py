"""The CPU kernel of decoupled GAE: one pass over memory, compiled at first use (about half a second)."""

import numba
import numpy as np

# Tokens whose places fit in the first-level cache together with the data.
_BLOCK = 256


# nogil: the caller runs one call per block of rows in threads. contract: allow fused multiply-add.
@numba.njit(nogil=True, fastmath={"contract"})
def gae_rows(
    gamma: float,
    rewards: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    lam_actor: np.ndarray,
    lam_critic: np.ndarray,
    bootstrap_values: np.ndarray,
    advantages: np.ndarray,
    returns: np.ndarray,
) -> None:
    """Fill ``advantages`` and ``returns``. Compiled for contiguous arrays, so all arguments are positional.

    Accumulates in float64 whatever the type of the arrays, so that each output is rounded once. A block's valid
    places are listed first, without a branch, so that a scattered mask costs no more than a solid one (a branch on the
    mask inside the recursion is half as fast there).

    Args:
        gamma: discount per token.
        rewards: [B, T] float32 or float64.
        values: [B, T], of the same type.
        mask: bool [B, T].
        lam_actor: float64 [B].
        lam_critic: float64 [B].
        bootstrap_values: float64 [B], of the states after the last valid tokens.
        advantages: [B, T], of the type of rewards; every element is written.
        returns: like advantages.
    """
    num_tokens = rewards.shape[1]
    # Unsigned places: numba need not ask whether an index counts from the end, which would cost a third of the time.
    places = np.empty(_BLOCK, np.uint32)
    for b in range(len(rewards)):
        row_rewards, row_values, row_mask = rewards[b], values[b], mask[b]
        row_advantages, row_returns = advantages[b], returns[b]
        decay_actor = gamma * lam_actor[b]
        decay_critic = gamma * lam_critic[b]
        next_value = bootstrap_values[b]
        advantage_actor = 0.0
        advantage_critic = 0.0
        for block_end in range(num_tokens, 0, -_BLOCK):
            block_start = max(block_end - _BLOCK, 0)
            num_valid = np.uintp(0)
            for place in range(block_end - 1, block_start - 1, -1):
                places[num_valid] = place
                num_valid += np.uintp(row_mask[np.uintp(place)])
            if num_valid < block_end - block_start:
                row_advantages[block_start:block_end] = 0.0
                row_returns[block_start:block_end] = 0.0
            for i in range(num_valid):
                t = np.uintp(places[i])
                value = np.float64(row_values[t])
                td_error = row_rewards[t] + gamma * next_value - value
                advantage_actor = td_error + decay_actor * advantage_actor
                advantage_critic = td_error + decay_critic * advantage_critic
                row_advantages[t] = advantage_actor
                row_returns[t] = advantage_critic + value
                next_value = value
