"""Draws charts with matplotlib: as inline SVG for the page, as SVG and PDF files for papers.

Only Figure and, through savefig, the SVG and PDF backends are used: no pyplot, so no global state and no window system.
The output depends on the data alone: no date, no random identifiers.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from matplotlib import rcParams, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_vcppo.integers import ceil_div
from megatron_vcppo.report.chart_data import Chart, Line, Lines, Stack, extent, thin
from megatron_vcppo.report.inline_svg import HotSpot, inline_svg
from megatron_vcppo.report.text_table import short

STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "text.parse_math": False,  # a run may be called a$b$c
    "text.color": "#475467",
    "axes.labelcolor": "#475467",
    "xtick.labelcolor": "#475467",
    "ytick.labelcolor": "#475467",
    "xtick.color": "#98a2b3",
    "axes.edgecolor": "#98a2b3",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e7ec",
    "ytick.left": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "svg.hashsalt": "megatron_vcppo",
    "pdf.fonttype": 42,  # TrueType: what publishers accept
}
POINTS_PER_INCH = 72
ON_PAGE = {"font.size": 11, "lines.linewidth": 1.6, "lines.markersize": 4, "svg.fonttype": "none"}
IN_PAPER = {
    "font.size": 8,
    "legend.fontsize": 6.5,
    "legend.borderpad": 0,
    "legend.columnspacing": 1.0,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 2.5,
    "svg.fonttype": "path",
}
PAGE_WIDTH, PAGE_HEIGHT = 440, 240
"""Points, which are the units of the SVG."""
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 36
"""Margins on the page, in points."""
COLUMN_INCHES = 3.3
"""The column of a paper in two columns."""
MOST_MARKERS = 40
"""Lines of at most this many points show each of them, on the page with its numbers as a tooltip."""
SMALLEST_COUNT = 4
"""An x axis that is at least this long has whole numbers."""
NO_DATE = {"Date": None}


def page_svg(chart: Chart) -> str:
    """An SVG element for the page, which has the title and the legend next to it."""
    with style.context([STYLE, ON_PAGE], after_reset=True):
        figure = Figure((PAGE_WIDTH / POINTS_PER_INCH, PAGE_HEIGHT / POINTS_PER_INCH), dpi=POINTS_PER_INCH)
        width, height = 1 - (LEFT + RIGHT) / PAGE_WIDTH, 1 - (TOP + BOTTOM) / PAGE_HEIGHT
        figure.patch.set_visible(False)
        axes = figure.add_axes((LEFT / PAGE_WIDTH, BOTTOM / PAGE_HEIGHT, width, height))
        axes.patch.set_visible(False)
        draw(axes, chart)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata=NO_DATE)
        return inline_svg(svg.getvalue(), chart.name, description(chart), hot_spots(axes, chart))


def paper_files(chart: Chart) -> dict[str, bytes]:
    """File name → content of one column's width: SVG with text as paths, PDF with its fonts in it."""
    with style.context([STYLE, IN_PAPER], after_reset=True):
        handles = legend_handles(chart)
        longest = max((len(str(handle.get_label())) for handle in handles), default=0)
        columns = 3 if longest <= 15 else 2 if longest <= 27 else 1
        legend_rows = ceil_div(len(handles), columns)
        figure = Figure((COLUMN_INCHES, 2.1 + 0.14 * legend_rows), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, chart)
        axes.set_ylabel(chart.y_label)
        if handles:
            figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        svg, pdf = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata=NO_DATE)
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return {f"{chart.name}.svg": svg.getvalue(), f"{chart.name}.pdf": pdf.getvalue()}


def draw(axes: Axes, chart: Chart) -> None:
    """Put the chart's content and its x label into empty axes."""
    if isinstance(chart.content, Lines):
        _draw_lines(axes, chart.content)
    else:
        _draw_stack(axes, chart.content)
    axes.set_xlabel(chart.x_label)
    left, right = axes.get_xlim()
    counts = right - left >= SMALLEST_COUNT  # iterations or tokens, not a share
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=counts, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def _draw_lines(axes: Axes, content: Lines) -> None:
    lines = [thinned(line) for line in content.lines]
    axes.set_xlim(content.x_range or extent((x for line in lines for x, _ in line.points), margin=0.0))
    axes.set_ylim(content.y_range or _y_range(lines, content))
    if content.reference is not None:
        axes.axhline(content.reference, color="#98a2b3", linewidth=1, dashes=(4, 3))
    for line in lines:
        xs, lows, highs = (list(part) for part in zip(*line.band)) if line.band else ([], [], [])
        if line.dots:
            axes.vlines(xs, lows, highs, color=line.color)
        elif line.band:
            axes.fill_between(xs, lows, highs, color=line.color, alpha=0.14, linewidth=0)
    for line in lines:
        axes.plot(
            [x for x, _ in line.points],
            [math.nan if y is None else y for _, y in line.points],
            color=line.color,
            linestyle="none" if line.dots else "solid",
            marker="o",
            markersize=rcParams["lines.markersize"] * (1.5 if line.dots else 1),
            markeredgewidth=0,
            markevery=marked(line, lines),
            clip_on=False,  # a marker at the border is drawn whole
        )


def _y_range(lines: Iterable[Line], content: Lines) -> tuple[float, float]:
    values = [y for line in lines for _, y in line.points]
    values += [edge for line in lines for _, *edges in line.band for edge in edges]
    low, high = extent(values if content.reference is None else [*values, content.reference])
    return (low if content.negative else max(low, 0.0)), high


def _draw_stack(axes: Axes, content: Stack) -> None:
    tops = list(accumulate(content.layers.values(), lambda below, layer: [a + b for a, b in zip(below, layer)]))
    for name, top in reversed(list(zip(content.layers, tops))):  # each down to 0, the highest first: no seams
        axes.stairs(top, content.edges, fill=True, color=content.colors[name], linewidth=0)
    axes.set_xlim(content.edges[0], content.edges[-1])
    axes.set_ylim(0.0, max(*tops[-1], 1e-9) * 1.05)


def thinned(line: Line) -> Line:
    """A line of at most MOST_POINTS points, with gaps where a value is not finite."""
    points = [(x, y if y is not None and math.isfinite(y) else None) for x, y in thin(line.points)]
    band = [(x, low, high) for x, low, high in line.band if math.isfinite(low) and math.isfinite(high)]
    if not line.dots:
        lows, highs = thin([(x, low) for x, low, _ in band]), thin([(x, high) for x, _, high in band])
        band = [(x, low, high) for (x, low), (_, high) in zip(lows, highs) if low is not None and high is not None]
    return Line(line.name, line.color, points, band, line.dots)


def marked(line: Line, lines: Sequence[Line]) -> list[int]:
    """Which points get a marker: all if all lines have few, else those that no line reaches: both sides are gaps."""
    values = [y for _, y in line.points]
    present = [i for i, y in enumerate(values) if y is not None]
    if line.dots or max(len(one.points) for one in lines) <= MOST_MARKERS:
        return present
    padded = [None, *values, None]
    return [i for i in present if padded[i] is None and padded[i + 2] is None]


def legend_handles(chart: Chart) -> list[Line2D | Patch]:
    """What a figure without a page around it must explain."""
    if isinstance(chart.content, Stack):
        return [Patch(color=color, label=name) for name, color in chart.legend.items()]
    if len(chart.content.lines) == 1:
        return []
    return [
        Line2D(
            [],
            [],
            color=line.color,
            label=line.name,
            linestyle="none" if line.dots else "solid",
            marker="o" if line.dots else "",
        )
        for line in chart.content.lines
    ]


def tick_text(value: float) -> str:
    """Example: 0.25, 1200, 1e-06."""
    return f"{value:.6g}" if abs(value) < 1e5 else f"{value:.2g}"


def description(chart: Chart) -> str:
    """The chart as text, for those who do not see it."""
    if isinstance(chart.content, Stack):
        return f"{chart.title}: {', '.join(chart.legend)}"
    parts = []
    for line in chart.content.lines:
        values = [(x, y) for x, y in line.points if y is not None and math.isfinite(y)]
        if values:
            (first_x, first), (last_x, last) = values[0], values[-1]
            parts.append(f"{line.name}: {short(first)} at {short(first_x)} to {short(last)} at {short(last_x)}")
    return f"{chart.title} by {chart.x_label}. {'; '.join(parts)}"


def hot_spots(axes: Axes, chart: Chart) -> Iterator[HotSpot]:
    """Areas of a page's chart that show their numbers under the pointer."""

    def pixel(x: float, y: float) -> tuple[float, float]:
        right, up = axes.transData.transform((x, y))
        return right, PAGE_HEIGHT - up

    if isinstance(chart.content, Lines):
        lines = [thinned(line) for line in chart.content.lines]
        for line in lines:
            for x, y in (line.points[i] for i in marked(line, lines)):
                assert y is not None
                right, down = pixel(x, y)
                yield HotSpot(right - 4, down - 4, 8, 8, f"{line.name}: {short(y)} at {short(x)}")
    else:
        edges = chart.content.edges
        for i in range(len(edges) - 1):
            heights = {name: layer[i] for name, layer in chart.content.layers.items()}
            left, top = pixel(edges[i], sum(heights.values()))
            right, bottom = pixel(edges[i + 1], 0.0)
            text = ", ".join(f"{name} {short(height)}" for name, height in heights.items())
            yield HotSpot(left, top, right - left, bottom - top, f"from {edges[i] + 0.5:g}: {text}")
