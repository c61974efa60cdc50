"""Charts: ticks, thinning, gaps, and where a value lands."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcppo.report.svg import BOTTOM, HEIGHT, MOST_POINTS, TOP, Bar, Line, bar_chart, line_chart, thin, ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, size: float) -> None:
    found = ticks(low, low + size)
    assert 1 <= len(found) <= 7
    slack = 1e-6 * max(abs(low), size)
    assert all(low - slack <= tick <= low + size + slack for tick in found)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=2000))
def test_thinning_keeps_means_and_bounds(values: list[float]) -> None:
    points = thin([(float(i), value) for i, value in enumerate(values)])
    assert len(points) <= MOST_POINTS
    found = [y for _, y in points if y is not None]
    assert min(values) - 1e-9 <= min(found) and max(found) <= max(values) + 1e-9
    if len(values) <= MOST_POINTS:
        assert found == values


def test_a_gap_parts_the_line_and_a_lone_point_is_a_dot() -> None:
    points = [(float(i), math.nan if i in (50, 52) else 1.0 * i) for i in range(100)]
    chart = line_chart([Line("a", "#000", points)], "x")
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 1


def test_values_land_where_the_axis_says() -> None:
    chart = line_chart([Line("a", "#000", [(0.0, 0.0), (1.0, 10.0)])], "x", y_range=(0.0, 10.0))
    path = re.search(r'points="([^"]+)"', chart)
    assert path
    (_, low), (_, high) = (map(float, point.split(",")) for point in path[1].split())
    assert (low, high) == (HEIGHT - BOTTOM, TOP)


@pytest.mark.parametrize("value", [0.0, 2e-3, -5.0, 1e9])
def test_a_constant_line_is_in_the_middle(value: float) -> None:
    chart = line_chart([Line("a", "#000", [(0.0, value), (1.0, value)])], "x")
    path = re.search(r'points="([^"]+)"', chart)
    assert path
    assert float(path[1].split(",")[-1]) == pytest.approx((HEIGHT - BOTTOM + TOP) / 2, abs=0.1)


def test_bars_are_stacked_to_the_sum() -> None:
    chart = bar_chart([Bar(0.5, 1.5, {"a": 1.0, "b": 3.0})], {"a": "#000", "b": "#111"}, "x")
    heights = [float(text) for text in re.findall(r'height="([\d.]+)" fill', chart)]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    tops = [float(text) for text in re.findall(r'<rect x="[\d.]+" y="([\d.]+)"', chart)]
    assert tops[1] + heights[1] == pytest.approx(tops[0], abs=0.11)
    assert TOP <= tops[1] <= TOP + 0.06 * HEIGHT
