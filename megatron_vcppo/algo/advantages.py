"""What surrounds GAE: λ by length, the value after an unfinished response, baselines without a critic, whitening, and a
gate for critics that know nothing."""

import torch
from torch import Tensor

from megatron_vcppo.algo.masked import last_valid, mean_and_variance
from megatron_vcppo.errors import UserError


def length_adaptive_lam(lengths: Tensor, alpha: float) -> Tensor:
    """λ = 1 - 1 / (α l), clamped: float64 [B] (VAPO, arXiv 2504.05118, Eq. 4-5; α = 0.05 there).

    lengths: [B] valid tokens. The sum of the GAE weights is then about α l, in proportion to the length. Deviation:
    the formula is 0 at l = 1/α and negative below, so it is clamped to [0, 1].
    """
    return (1.0 - 1.0 / (alpha * lengths.double())).clamp(0.0, 1.0)


def bootstrap_of_unfinished(values: Tensor, mask: Tensor, unfinished: Tensor) -> Tensor:
    """``bootstrap_values`` of extended GAE (T-PPO, arXiv 2506.15050): [B], of values' dtype.

    A response that is not finished has earned no reward yet, and no token stands for the state after its last one:
    V(s_l) = V(s_{l-1}) is assumed, so that, without discount, the last token's error δ is 0. Finished responses have 0.

    values: [B, T]; mask: bool [B, T], response tokens; unfinished: bool [B].
    """
    return torch.where(last_valid(mask) & unfinished[:, None], values, 0.0).sum(dim=1)


def group_advantages(rewards: Tensor, group_ids: Tensor, kind: str) -> Tensor:
    """Advantage of each rollout over the other samples of its prompt, [B], of rewards' dtype: no critic is needed.

    rewards: [B]; group_ids: integers [B], equal for samples of one prompt; whole groups must be present.
    grpo: (r - mean) / std (unbiased; arXiv 2402.03300); a group whose rewards are equal gets 0. rloo: r - mean of the
    others (arXiv 2402.14740).
    Raises UserError if a group has a single sample.
    """
    groups = group_ids.unique(return_inverse=True)[1]
    moments = torch.zeros(int(groups.max()) + 1, 2, dtype=torch.float64, device=rewards.device)
    r = rewards.double()
    moments.index_add_(0, groups, torch.stack((torch.ones_like(r), r), dim=1))
    count, total = moments[groups].unbind(1)
    if bool((count < 2).any()):
        raise UserError(
            f"{int((count < 2).sum())} prompts have one sample: a {kind} baseline needs 2 or more samples per prompt"
        )
    centered = r - total / count
    if kind == "rloo":
        return (centered * count / (count - 1)).to(rewards.dtype)
    assert kind == "grpo", f"group baseline {kind!r} is neither grpo nor rloo"
    squares = torch.zeros(len(moments), dtype=torch.float64, device=rewards.device)
    squares.index_add_(0, groups, centered.square())
    std = (squares[groups] / (count - 1)).sqrt()
    return torch.where(std > 1e-6, centered / std.clamp(min=1e-6), 0.0).to(rewards.dtype)


def broadcast_to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B] to [B, T]: each valid token gets its rollout's advantage, others 0. mask: bool [B, T]."""
    return torch.where(mask, advantages[:, None], 0.0)


def whiten(x: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """(x - mean) / std on valid tokens, 0 elsewhere; any shape, that of x.

    mask: bool, the shape of x. moments: ``masked_moments``, float64 [3], summed over whatever the batch is distributed
    over, so that every rank whitens alike. Deviation from the usual std + ε: where the variance is no more than
    rounding (below 1e-12 of mean²), nothing is divided, so constant x is not blown up.
    """
    mean, variance = mean_and_variance(moments)
    scale = torch.where(variance > 1e-12 * mean.square(), variance.sqrt(), 1.0)
    return ((x - mean.to(x.dtype)) / scale.to(x.dtype)).masked_fill(~mask, 0.0)


def gate_on_explained_variance(
    advantages: Tensor, *, returns: Tensor, mask: Tensor, explained_variance: float, mean_return: float
) -> Tensor:
    """The critic's advantages if it explains any variance, else returns - mean_return (EVPO, arXiv 2604.19485).

    advantages, returns: [B, T], with returns of λ = 1; mask: bool [B, T]; explained_variance and mean_return: of the
    whole batch. Returns [B, T]. A critic with explained variance ≤ 0 adds more noise than a constant baseline removes.
    """
    if explained_variance > 0:
        return advantages
    return (returns - mean_return).masked_fill(~mask, 0.0)
