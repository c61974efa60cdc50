"""Metrics that add up: name -> (sum, weight), tensors of one shape.

Sums and weights over micro-batches and ranks may be added in any grouping; ``means`` divides at the very end. A total,
such as a loss that is already divided by the batch's denominator, has weight 0 and is not divided: make it with
``total_metric`` and read it with ``means``, which are all that know of this. What is not a mean, such as a variance, is
derived from means of powers after that.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from megatron_vcppo.algo.masked import masked_moments

Metrics = dict[str, tuple[Tensor, Tensor]]

# Relative to E[x²]: variance below this is rounding error and treated as zero (std/|x| < 1e-6).
_ROUNDING = 1e-12


def mean_metric(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ, count) over valid tokens of x: numbers or bool, any shape, that of mask (bool). Both float64 0-d."""
    count, total, _ = masked_moments(x, mask)
    return total, count


def moment_metrics(name: str, x: Tensor, mask: Tensor) -> Metrics:
    """``name`` and ``name_squared``, from whose means ``standard_deviation(means, name)`` follows; float64 0-d.

    x: any shape; mask: bool, the same shape.
    """
    count, total, squares = masked_moments(x, mask)
    return {name: (total, count), f"{name}_squared": (squares, count)}


def total_metric(x: Tensor) -> tuple[Tensor, Tensor]:
    """A sum that is itself the metric: weight 0. x: any shape, usually 0-d; float64 of that shape."""
    x = x.detach().double()
    return x, torch.zeros_like(x)


def add(parts: Iterable[Mapping[str, tuple[Tensor, Tensor]]]) -> Metrics:
    """Sums of sums and sums of weights; every part has the same names, and the same shapes for a name. Of none: {}."""
    first, *rest = [*parts] or [{}]
    for part in rest:
        assert part.keys() == first.keys(), f"metrics {sorted(part.keys() ^ first.keys())} are not in every part"
    return {
        name: (sum((p[name][0] for p in rest), first[name][0]), sum((p[name][1] for p in rest), first[name][1]))
        for name in first
    }


def add_over(metrics: Metrics, total: Callable[[Tensor], Tensor]) -> Metrics:
    """Metrics summed over ranks, all of which have the same names and shapes. total: sums a float64 [n] over them."""
    flat = torch.cat([part.double().flatten() for pair in metrics.values() for part in pair])
    parts = iter(total(flat).split([part.numel() for pair in metrics.values() for part in pair]))
    return {name: (next(parts).view(s.shape), next(parts).view(w.shape)) for name, (s, w) in metrics.items()}


def means(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """sum / weight, of the shape of both; the sum itself where the weight is 0."""
    return {name: torch.where(w == 0, s, s / w) for name, (s, w) in metrics.items()}


def standard_deviation(values: Mapping[str, float], name: str) -> float:
    """√(E[x²] - E[x]²) from the means ``name`` and ``name_squared``; 0 where the difference is only rounding."""
    squares = values[f"{name}_squared"]
    variance = squares - values[name] ** 2
    return math.sqrt(variance) if variance > _ROUNDING * squares else 0.0


def explained_variance(values: Mapping[str, float]) -> float:
    """1 - Var(returns - values) / Var(returns) from the means that ``value_loss`` reports; 0 if the returns are equal.

    0: the critic is no better than a constant; below 0: worse. 1: it is exact.
    """
    returns_variance = standard_deviation(values, "returns") ** 2
    if returns_variance == 0:
        return 0.0
    return 1.0 - standard_deviation(values, "value_errors") ** 2 / returns_variance
