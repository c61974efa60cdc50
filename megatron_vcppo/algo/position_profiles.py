"""How a quantity depends on the place in the response: profiles, slope and correlation, all as metrics that add up.

Places count valid tokens only, from 0 at the response's first. Absolute places are token counts; relative ones run
from 0 to 1 over the response's own length, so that short and long responses are seen on one axis.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_vcppo.algo.masked import valid_index
from megatron_vcppo.algo.metrics import Metrics, moment_metrics, standard_deviation

_DECILES = 10


def position_profile(x: Tensor, mask: Tensor, bin_width: int, num_bins: int) -> tuple[Tensor, Tensor]:
    """(sums, counts) float64 [num_bins] over absolute places; the last bin also takes every later token.

    x: [B, T]; mask: bool [B, T]; bin_width: tokens.
    """
    bins = (valid_index(mask) // bin_width).clamp(max=num_bins - 1)
    return _binned(x, mask, bins, num_bins)


def decile_profile(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sums, counts) float64 [10] over tenths of each response's length. x: [B, T]; mask: bool [B, T]."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    bins = (valid_index(mask) * _DECILES // lengths).clamp(max=_DECILES - 1)
    return _binned(x, mask, bins, _DECILES)


def relative_position(mask: Tensor) -> Tensor:
    """float32 [B, T], in (0, 1): the middle of each token's share of its response. mask: bool [B, T]."""
    return (valid_index(mask) + 0.5) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def trend_metrics(name: str, x: Tensor, positions: Tensor, mask: Tensor) -> Metrics:
    """The five means from which ``trend`` finds slope and correlation of x over positions.

    x, positions: [B, T]; mask: bool [B, T]. Returns pairs of float64 0-d.
    """
    product = (x.double() * positions.double()).masked_fill(~mask, 0.0)
    return {
        **moment_metrics(f"{name}_x", x, mask),
        **moment_metrics(f"{name}_position", positions, mask),
        f"{name}_product": (product.sum(), mask.sum().double()),
    }


def trend(values: Mapping[str, float], name: str) -> tuple[float, float]:
    """(slope, correlation) of the least-squares line, from the means of ``trend_metrics``; 0 if nothing varies."""
    std_x, std_position = (standard_deviation(values, f"{name}_{part}") for part in ("x", "position"))
    if std_x == 0 or std_position == 0:
        return 0.0, 0.0
    covariance = values[f"{name}_product"] - values[f"{name}_x"] * values[f"{name}_position"]
    correlation = covariance / (std_x * std_position)
    return covariance / std_position**2, math.copysign(min(1.0, abs(correlation)), correlation)


def terminal_share(mask: Tensor, decay: float | Tensor) -> Tensor:
    """float64 [B, T]: decay^(T - t), the share of the last token's reward that reaches token t (VC-PPO §3.3).

    mask: bool [B, T]; decay: γλ, a number or [B]. 1 at the last valid token, 0 where masked.
    """
    decay = torch.as_tensor(decay, dtype=torch.float64, device=mask.device).reshape(-1, 1)
    tokens_after = mask.sum(dim=1, keepdim=True) - 1 - valid_index(mask)
    return torch.where(mask, decay**tokens_after, 0.0)


def _binned(x: Tensor, mask: Tensor, bins: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    chosen = bins[mask]
    sums = torch.zeros(num_bins, dtype=torch.float64, device=x.device)
    sums.index_add_(0, chosen, x.detach()[mask].double())
    return sums, chosen.bincount(minlength=num_bins).double()
