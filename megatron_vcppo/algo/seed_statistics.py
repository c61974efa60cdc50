"""Means over seeds, paired differences between arms, correlations over runs, and the verdict on a claim. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % point of Student's t by degrees of freedom, from 1; more than 30 use the last, which is a little wide."""
Z_95 = 1.959964

Verdict = Literal["supported", "not supported", "contrary", "not judged"]


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error over ``count`` seeds. Example: 1, 2, 3 → ``Mean(2.0, 0.577, 3)``."""

    value: float
    error: float | None
    """None where there is a single number, which says nothing about the others."""
    count: int

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean, by Student's t."""
        return None if self.error is None else t_95(self.count - 1) * self.error


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def t_95(degrees: int) -> float:
    """Half width of a 95 % interval in standard errors. degrees: of freedom, at least 1."""
    return _T_95[min(degrees, len(_T_95)) - 1]


def mean_over(values: Sequence[float]) -> Mean:
    """Mean and standard error (standard deviation with n - 1, over √n) of at least one number."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean, math.sqrt(variance / count), count)


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours minus theirs by seed, for the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def correlation(xs: Sequence[float], ys: Sequence[float]) -> Interval | None:
    """Pearson's correlation with its 95 % interval by Fisher's z; None for fewer than 4 pairs, or a constant."""
    count = len(xs)
    if count < 4:
        return None
    mean_x, mean_y = math.fsum(xs) / count, math.fsum(ys) / count
    dx, dy = [x - mean_x for x in xs], [y - mean_y for y in ys]
    scale = math.sqrt(math.fsum(x * x for x in dx) * math.fsum(y * y for y in dy))
    if scale == 0:
        return None
    r = math.fsum(x * y for x, y in zip(dx, dy, strict=True)) / scale
    z, width = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), Z_95 / math.sqrt(count - 3)
    return Interval(r, math.tanh(z - width), math.tanh(z + width))


def judge(interval: Interval | None, above: float = 0.0) -> Verdict:
    """Whether a number lies above a threshold, by its 95 % interval.

    supported: the whole interval lies above. contrary: it lies below. not supported: it holds the threshold. not
    judged: there is no interval.
    """
    if interval is None:
        return "not judged"
    if interval.low > above:
        return "supported"
    return "contrary" if interval.high < above else "not supported"


def interval_of(mean: Mean) -> Interval | None:
    """The 95 % interval of a mean over seeds; None for a single seed."""
    if mean.half_width is None:
        return None
    return Interval(mean.value, mean.value - mean.half_width, mean.value + mean.half_width)


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on several claims together, at least one: that of the weakest."""
    order: tuple[Verdict, ...] = ("contrary", "not judged", "not supported", "supported")
    return min(verdicts, key=order.index)
