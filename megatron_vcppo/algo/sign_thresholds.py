"""From scores of failed and of healthy runs to a threshold, and what a threshold is worth on other runs. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """What a threshold does: a score above it is an alarm."""

    hits: int
    failed: int
    false_alarms: int
    healthy: int


def halves(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """Every other one from the first, and the rest: runs in the order of arms and seeds give each half both."""
    return [*items[::2]], [*items[1::2]]


def count(failed: Sequence[float], healthy: Sequence[float], threshold: float) -> Counts:
    """Alarms of a threshold among the scores of failed and of healthy runs."""
    above = [sum(score > threshold for score in scores) for scores in (failed, healthy)]
    return Counts(above[0], len(failed), above[1], len(healthy))


def fit_threshold(failed: Sequence[float], healthy: Sequence[float]) -> float | None:
    """The threshold with the highest share of hits minus share of false alarms; None if a class is empty.

    It lies midway between two neighboring scores; of equally good ones the middle one, which is farthest from both
    classes where they are apart.
    """
    if not failed or not healthy:
        return None
    scores = sorted({*failed, *healthy})
    if len(scores) == 1:
        return scores[0]
    candidates = [(low + high) / 2 for low, high in pairwise(scores)]

    def worth(threshold: float) -> float:
        counts = count(failed, healthy, threshold)
        return counts.hits / counts.failed - counts.false_alarms / counts.healthy

    best = max(map(worth, candidates))
    equal = [threshold for threshold in candidates if worth(threshold) >= best - 1e-12]
    return equal[(len(equal) - 1) // 2]
