"""Metrics that add up: name -> (sum, weight), tensors of one shape.

Sums and weights over micro-batches and ranks may be added in any grouping; ``means`` divides at the very end. A weight
of 0 says that the sum itself is the metric (a loss that is already divided by the batch's denominator). What is not a
mean, such as a variance, is derived from means of powers after that.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_vcppo.algo.masked import masked_moments

Metrics = dict[str, tuple[Tensor, Tensor]]

# Of E[x²]: what is left of it by E[x]² for constant x. A spread of a millionth of the size counts as none.
_ROUNDING = 1e-12


def mean_metric(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ, count) over valid tokens of x, numbers or bool; float64 0-d."""
    count, total, _ = masked_moments(x, mask)
    return total, count


def moment_metrics(name: str, x: Tensor, mask: Tensor) -> Metrics:
    """``name`` and ``name_squared``: from their means, ``standard_deviation(means, name)``."""
    count, total, squares = masked_moments(x, mask)
    return {name: (total, count), f"{name}_squared": (squares, count)}


def total_metric(x: Tensor) -> tuple[Tensor, Tensor]:
    """A sum that is itself the metric."""
    x = x.detach().double()
    return x, torch.zeros_like(x)


def add(parts: Iterable[Mapping[str, tuple[Tensor, Tensor]]]) -> Metrics:
    """Sums of sums, sums of weights; every part has the same names. Of no parts: empty."""
    first, *rest = [*parts] or [{}]
    for part in rest:
        assert part.keys() == first.keys(), f"metrics {sorted(part.keys() ^ first.keys())} are not in every part"
    return {
        name: (sum((p[name][0] for p in rest), first[name][0]), sum((p[name][1] for p in rest), first[name][1]))
        for name in first
    }


def to_vector(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Every sum and weight in one float64 vector, which ranks can add in one all-reduce."""
    return torch.cat([x.double().flatten() for pair in metrics.values() for x in pair])


def from_vector(vector: Tensor, like: Mapping[str, tuple[Tensor, Tensor]]) -> Metrics:
    """Undo ``to_vector``; ``like`` has the names and shapes."""
    parts = iter(vector.split([x.numel() for pair in like.values() for x in pair]))
    return {name: (next(parts).view(s.shape), next(parts).view(w.shape)) for name, (s, w) in like.items()}


def means(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """sum / weight; the sum itself where the weight is 0."""
    return {name: torch.where(w == 0, s, s / w) for name, (s, w) in metrics.items()}


def standard_deviation(values: Mapping[str, float], name: str) -> float:
    """√(E[x²] - E[x]²) from the means ``name`` and ``name_squared``; 0 where the difference is only rounding."""
    squares = values[f"{name}_squared"]
    variance = squares - values[name] ** 2
    return math.sqrt(variance) if variance > _ROUNDING * squares else 0.0


def explained_variance(values: Mapping[str, float]) -> float:
    """1 - Var(returns - values) / Var(returns) from the means that ``value_loss`` reports; 0 if the returns are equal.

    0: the critic says no more than a constant; below 0: less. 1: it is exact.
    """
    returns_variance = standard_deviation(values, "returns") ** 2
    if returns_variance == 0:
        return 0.0
    return 1.0 - standard_deviation(values, "value_errors") ** 2 / returns_variance
