"""Charts as inline SVG, written by hand: no script, no font, no file beside the page; a chart is a few kilobytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 34
MOST_POINTS = 300
"""More points than this on a line are averaged in groups."""
MOST_MARKERS = 40
"""Lines of at most so many points show them, each with its numbers as a tooltip."""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """One line of a chart; a point without a value, or with one that is not finite, is a gap."""

    name: str
    colour: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high): a shaded range, such as percentiles."""
    dots: bool = False
    """Points with error bars from ``band`` instead of a line."""


@dataclass(frozen=True)
class Frame:
    """From data to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Pixel of an x."""
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixel of a y."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


@dataclass(frozen=True)
class Bar:
    """A stacked bar: name → height, drawn from the bottom up."""

    x_low: float
    x_high: float
    parts: dict[str, float] = field(default_factory=dict)


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    reference: float | None = None,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG element. reference: a dashed horizontal line; ranges: of several charts that are to be compared."""
    thinned = [Line(one.name, one.colour, thin(one.points), one.band, one.dots) for one in lines]
    frame = Frame(*(x_range or x_extent(thinned)), *(y_range or y_extent(thinned, reference)))
    marked = max(len(one.points) for one in thinned) <= MOST_MARKERS
    shapes = [_axes(frame, x_label)]
    if reference is not None:
        y = f"{frame.y(reference):.1f}"
        shapes.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    shapes += [_band(frame, one) for one in thinned if one.band]
    shapes += [_curve(frame, one, marked) for one in thinned]
    return _element(shapes)


def x_extent(lines: Sequence[Line]) -> tuple[float, float]:
    """The range that holds every point."""
    xs = [x for one in lines for x, _ in one.points]
    return _padded(min(xs), max(xs), 0.0)


def y_extent(lines: Sequence[Line], reference: float | None = None) -> tuple[float, float]:
    """The range that holds every line, its band and the reference, with a margin."""
    ys = [y for one in lines for _, y in one.points if y is not None and math.isfinite(y)]
    ys += [edge for one in lines for _, *edges in one.band for edge in edges if math.isfinite(edge)]
    if reference is not None:
        ys.append(reference)
    return _padded(min(ys, default=0.0), max(ys, default=1.0), 0.05)


def bar_chart(bars: Sequence[Bar], colours: dict[str, str], x_label: str) -> str:
    """Stacked bars as an SVG element."""
    top = max(sum(bar.parts.values()) for bar in bars)
    frame = Frame(bars[0].x_low, bars[-1].x_high, 0.0, max(top * 1.05, 1e-9))
    shapes = [_axes(frame, x_label)]
    for bar in bars:
        left, right, bottom = frame.x(bar.x_low), frame.x(bar.x_high), 0.0
        gap = min(1.5, 0.1 * (right - left))
        for name, value in bar.parts.items():
            high, low = frame.y(bottom + value), frame.y(bottom)
            bottom += value
            shapes.append(
                f'<rect x="{left + gap:.1f}" y="{high:.1f}" width="{right - left - 2 * gap:.1f}" '
                f'height="{low - high:.1f}" fill="{colours[name]}"><title>{escape(name)} {short(value)}</title></rect>'
            )
    return _element(shapes)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: means of equal groups of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(_mean([x for x, _ in group]), _mean_of_finite([y for _, y in group])) for group in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside low … high, about ``count`` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Three digits, without a needless exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def _element(shapes: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    return f'<svg {size} xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'


def _axes(frame: Frame, x_label: str) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = f"{frame.y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{_tick(value)}</text>')
    for value in ticks(frame.x_low, frame.x_high, 6):
        if value == int(value):
            x = f"{frame.x(value):.1f}"
            parts.append(f'<text x="{x}" y="{bottom + 15}" text-anchor="middle">{_tick(value)}</text>')
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 3}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 30}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e5 else f"{value:.2g}"


def _curve(frame: Frame, line: Line, marked: bool) -> str:
    """The line's runs of values between gaps, its points if marked; a run of one point is always a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if y is not None and math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    parts = []
    for run in runs:
        if len(run) > 1 and not line.dots:
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in run)
            parts.append(f'<polyline class="line" stroke="{line.colour}" points="{path}"/>')
    shown = [point for run in runs for point in run if marked or line.dots or len(run) == 1]
    for x, y in shown:
        parts.append(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{4 if line.dots else 2.4}" fill="{line.colour}">'
            f"<title>{escape(line.name)}: {short(y)} at {short(x)}</title></circle>"
        )
    return "".join(parts)


def _band(frame: Frame, line: Line) -> str:
    edges = [(x, low, high) for x, low, high in line.band if math.isfinite(low) and math.isfinite(high)]
    if line.dots:
        return "".join(
            f'<line stroke="{line.colour}" stroke-width="1.5" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" '
            f'y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>'
            for x, low, high in edges
        )
    lows = thin([(x, low) for x, low, _ in edges])
    highs = thin([(x, high) for x, _, high in edges])
    outline = [(x, y) for x, y in [*highs, *reversed(lows)] if y is not None]
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in outline)
    return f'<polygon class="band" fill="{line.colour}" points="{path}"/>'


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """A range of more than nothing, widened by a share of its size on both sides."""
    if high - low < 1e-12 * max(1.0, abs(low)):
        margin = abs(low) / 2 or 0.5
        return low - margin, high + margin
    return low - share * (high - low), high + share * (high - low)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of_finite(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return _mean(finite) if finite else None
