"""The CPU kernel of decoupled GAE: one pass over memory, compiled at first use (about half a second)."""

import numba
import numpy as np


# nogil: the caller runs one call per block of rows in threads. contract: allow fused multiply-add.
@numba.njit(nogil=True, fastmath={"contract"})
def gae_rows(
    rewards: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    bootstrap: np.ndarray,
    gamma: float,
    lam_actor: np.ndarray,
    lam_critic: np.ndarray,
    advantages: np.ndarray,
    returns: np.ndarray,
    first: int,
    end: int,
) -> None:
    """Fill rows first … end - 1 of ``advantages`` and ``returns`` [B, T].

    Accumulates in float64 whatever the type of the arrays, so that each output is rounded once. The branch on the
    mask is cheap: masks come in runs. rewards, values [B, T]; mask bool [B, T]; bootstrap, lam_* float64 [B].
    """
    num_tokens = rewards.shape[1]
    for b in range(first, end):
        decay_actor = gamma * lam_actor[b]
        decay_critic = gamma * lam_critic[b]
        next_value = bootstrap[b]
        advantage_actor = 0.0
        advantage_critic = 0.0
        for t in range(num_tokens - 1, -1, -1):
            if mask[b, t]:
                value = np.float64(values[b, t])
                td_error = rewards[b, t] + gamma * next_value - value
                advantage_actor = td_error + decay_actor * advantage_actor
                advantage_critic = td_error + decay_critic * advantage_critic
                advantages[b, t] = advantage_actor
                returns[b, t] = advantage_critic + value
                next_value = value
            else:
                advantages[b, t] = 0.0
                returns[b, t] = 0.0
