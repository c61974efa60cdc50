"""What a chart shows, as data: lines or stacked areas, their text and their ranges. report/drawing.py draws it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_vcppo.integers import ceil_div

MOST_POINTS = 300
"""Lines of more points are averaged in groups of neighbors."""

Point = tuple[float, float | None]
"""(x, y); y None or not finite: a gap in the line."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    color: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high): a shaded range, such as percentiles."""
    dots: bool = False
    """Single points, with ``band`` as error bars, instead of a line."""


@dataclass(frozen=True)
class Lines:
    """Lines that share their axes; a range that is None holds all the data."""

    lines: Sequence[Line]
    reference: float | None = None
    """Height of a dashed horizontal line."""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    negative: bool = True
    """False: values below 0 are impossible, so the y axis does not start below 0."""


@dataclass(frozen=True)
class Stack:
    """Layers over intervals of x, drawn from the bottom up."""

    edges: Sequence[float]
    """[intervals + 1], increasing."""
    layers: dict[str, Sequence[float]]
    """Name → height in each interval."""
    colors: dict[str, str]


@dataclass(frozen=True)
class Chart:
    """A chart with its text."""

    name: str
    """Unique on the page; the name of its files."""
    title: str
    caption: str
    x_label: str
    y_label: str
    """Shown in a file; on the page the title stands above the chart."""
    content: Lines | Stack
    legend: dict[str, str] = field(default_factory=dict)
    """What the colors mean: name → color."""


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: the means of equal groups of neighbors, without values that are not finite."""
    size = group_size(len(points))
    if size == 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(_mean([x for x, _ in group]), _mean_of_finite([y for _, y in group])) for group in groups]


def group_size(num_points: int, most: int = MOST_POINTS) -> int:
    """How many neighbors are averaged so that at most ``most`` points remain."""
    return max(1, ceil_div(num_points, most))


def extent(values: Iterable[float | None], margin: float = 0.05) -> tuple[float, float]:
    """The range that holds every finite value, wider by ``margin`` of its size at both ends and never empty."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if high - low < 1e-12 * max(1.0, abs(low)):
        return low - (abs(low) / 2 or 0.5), high + (abs(low) / 2 or 0.5)
    return low - margin * (high - low), high + margin * (high - low)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of_finite(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return _mean(finite) if finite else None
