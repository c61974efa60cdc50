"""Charts: which data they show, what is drawn of it, and the files they become."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from megatron_vcppo.cli import main
from megatron_vcppo.commands.report import read_runs
from megatron_vcppo.report.chart_data import MOST_POINTS, Chart, Line, Lines, Stack, extent, thin
from megatron_vcppo.report.drawing import draw, page_svg, paper_files
from megatron_vcppo.report.run_charts import charts_of, time_charts
from megatron_vcppo.report.run_data import RunData
from megatron_vcppo.run.metrics_log import read_history
from tests.helpers.recorded_run import record_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "plain"
    record_run(run, collapsing=True, iterations=6, num_rollouts=12)
    return run


def chart_with(content: Lines | Stack, name: str = "loss") -> Chart:
    return Chart(name=name, title="Loss", caption="", x_label="step", y_label="Loss", content=content)


def axes_of(content: Lines | Stack):
    axes = Figure().add_subplot()
    draw(axes, chart_with(content))
    return axes


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=2000))
def test_thinning_keeps_means_and_bounds(values: list[float]) -> None:
    points = thin([(float(i), value) for i, value in enumerate(values)])
    assert len(points) <= MOST_POINTS
    found = [y for _, y in points if y is not None]
    assert min(values) - 1e-9 <= min(found) and max(found) <= max(values) + 1e-9
    if len(values) <= MOST_POINTS:
        assert found == values


@given(st.lists(st.floats(-1e9, 1e9) | st.none() | st.just(math.nan)), st.floats(0, 0.5))
def test_a_range_holds_every_value_and_is_not_empty(values: list[float | None], margin: float) -> None:
    low, high = extent(values, margin)
    assert low < high
    assert all(low <= value <= high for value in values if value is not None and math.isfinite(value))


def test_a_curve_passes_through_the_logged_numbers(folder: Path) -> None:
    charts = {chart.title: chart for chart in charts_of(read_runs([folder])) if chart.name.startswith("ppo_")}
    logged = read_history(folder / "ppo")
    length = charts["Response length"].content
    assert isinstance(length, Lines)
    (line,) = length.lines
    assert list(line.points) == [(row["iteration"], row["rollout/length_mean"]) for row in logged]
    assert [(low, high) for _, low, high in line.band] == [
        (row["rollout/length_p10"], row["rollout/length_p90"]) for row in logged
    ]
    accuracy = charts["Accuracy (pass@1)"].content
    assert isinstance(accuracy, Lines)
    held_out = accuracy.lines[1]
    assert held_out.dots and held_out.points == [(6, 0.4)] and held_out.band == [pytest.approx((6, 0.35, 0.45))]


def test_several_runs_share_charts_and_ranges(folder: Path, tmp_path: Path) -> None:
    record_run(tmp_path / "other", collapsing=False, iterations=6, num_rollouts=12)
    charts = charts_of(read_runs([folder, tmp_path / "other"]))
    assert len({chart.name for chart in charts}) == len(charts)
    lines = {chart.name: chart.content for chart in charts if isinstance(chart.content, Lines)}
    assert [line.name for line in lines["ppo_reward"].lines] == ["plain", "other"]
    assert len({line.color for line in lines["ppo_reward"].lines}) == 2
    assert not any(line.band for line in lines["ppo_response_length"].lines)  # bands would hide each other
    first, second = lines["advantage_by_decile_1_plain"], lines["advantage_by_decile_2_other"]
    assert (first.x_range, first.y_range) == (second.x_range, second.y_range)
    assert [line.name for line in first.lines] == ["iteration 1", "iteration 4", "iteration 6"]


def test_phases_are_stacked_to_the_iteration_and_averaged_in_a_long_run() -> None:
    rows = [
        {"iteration": i, "time/generation_s": 3.0 + i % 2, "time/update_s": 2.0, "time/iteration_s": 6.5}
        for i in range(1, 121)
    ]
    (chart,) = time_charts([RunData("a", "#000", {}, ["ppo"], frozenset(), {"ppo": rows}, [], [])])
    stack = chart.content
    assert isinstance(stack, Stack)
    assert "a bar is the mean of 2 iterations" in chart.caption
    assert list(stack.edges) == [0.5 + 2 * i for i in range(61)]
    assert {name: set(heights) for name, heights in stack.layers.items()} == {
        "generation": {3.5},
        "update": {2.0},
        "other": {1.0},
    }
    assert "generation 3.5 s (54 %)" in chart.legend


def test_a_gap_parts_the_line_and_a_lone_point_is_a_dot() -> None:
    points = [(float(i), math.nan if i in (50, 52) else 1.0 * i) for i in range(100)]
    (drawn,) = axes_of(Lines([Line("a", "#000", points)])).lines
    assert np.isnan(drawn.get_ydata()).nonzero()[0].tolist() == [50, 52]
    assert drawn.get_markevery() == [51]


def test_few_points_are_marked_and_more_are_not() -> None:
    for count, marked in ((40, 40), (41, 0)):
        (drawn,) = axes_of(Lines([Line("a", "#000", [(float(i), 1.0) for i in range(count)])])).lines
        assert len(drawn.get_markevery()) == marked


def test_infinite_values_do_not_stretch_the_axis() -> None:
    axes = axes_of(Lines([Line("a", "#000", [(1.0, 0.0), (2.0, math.inf), (3.0, 10.0)])]))
    assert axes.get_ylim() == (-0.5, 10.5)


def test_what_cannot_be_negative_starts_at_zero() -> None:
    line = Line("a", "#000", [(1.0, 0.0), (2.0, 10.0)])
    assert axes_of(Lines([line], negative=False)).get_ylim()[0] == 0.0
    assert axes_of(Lines([line], reference=-5.0)).get_ylim()[0] < -5.0


def test_a_stack_is_drawn_to_its_sum() -> None:
    axes = axes_of(Stack([0.5, 1.5, 2.5], {"a": [1.0, 2.0], "b": [3.0, 1.0]}, {"a": "#000", "b": "#111"}))
    tops = sorted(patch.get_data().values.tolist() for patch in axes.patches)
    assert tops == [[1.0, 2.0], [4.0, 3.0]]
    assert axes.get_ylim() == (0.0, 4.2) and axes.get_xlim() == (0.5, 2.5)


def test_the_pages_svg_has_tooltips_a_description_and_its_own_names() -> None:
    band = [(1.0, 0.1, 0.3), (2.0, 0.2, 0.6)]
    chart = chart_with(Lines([Line("<a> & b", "#000", [(1.0, 0.25), (2.0, 0.5)], band)]), name="first")
    source = page_svg(chart)
    root = ElementTree.fromstring(source)
    assert [element.text for element in root.iter("title")] == ["<a> & b: 0.25 at 1", "<a> & b: 0.5 at 2"]
    assert root.get("aria-label") == "Loss by step. <a> & b: 0.25 at 1 to 0.5 at 2"
    assert re.findall(r"url\(#(.*?)\)", source) and set(re.findall(r"url\(#(.*?)\)", source)) <= set(
        re.findall(r'id="(first-.*?)"', source)
    )
    assert "step" in [element.text for element in root.iter("text")]
    assert page_svg(chart) == source  # nothing in it depends on the moment


def test_a_tooltip_lies_on_its_bar() -> None:
    stack = Stack([0.5, 1.5, 2.5], {"a": [1.0, 2.0], "b": [3.0, 0.0]}, {"a": "#000", "b": "#111"})
    root = ElementTree.fromstring(page_svg(chart_with(stack)))
    (first, second) = (element for element in root.iter("rect") if element.get("class") == "spot")
    assert first[0].text == "from 1: a 1, b 3"
    assert float(first.get("height", "")) == pytest.approx(2 * float(second.get("height", "")), abs=0.2)
    assert float(second.get("x", "")) == pytest.approx(
        float(first.get("x", "")) + float(first.get("width", "")), abs=0.2
    )


def test_figures_for_a_paper(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "made" / "figures"
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--figures", str(figures)]) == 0
    assert f"{figures}: " in capsys.readouterr().out
    charts = charts_of(read_runs([folder]))
    assert {path.name for path in figures.iterdir()} == {f"{c.name}.{kind}" for c in charts for kind in ("svg", "pdf")}
    svg, pdf = ((figures / f"ppo_response_length.{kind}").read_bytes() for kind in ("svg", "pdf"))
    width = ElementTree.fromstring(svg).get("width", "")
    assert width.endswith("pt") and float(width[:-2]) / 72 == pytest.approx(3.3, abs=0.01)
    assert b"<text" not in svg  # no font is needed to show it
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType fonts, embedded
    again = paper_files(next(chart for chart in charts if chart.name == "ppo_response_length"))
    assert again == {"ppo_response_length.svg": svg, "ppo_response_length.pdf": pdf}
