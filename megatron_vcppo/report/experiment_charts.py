"""The figures of an experiment: curves and profiles with standard errors over seeds, outcomes against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_vcppo.algo.seed_statistics import mean_over
from megatron_vcppo.report.chart_data import Chart, Line, Lines, extent
from megatron_vcppo.report.experiment_results import ExperimentResults, ExperimentRun, arm_color
from megatron_vcppo.report.run_charts import (
    PPO_PLOTS,
    REWARD_MODEL_PLOTS,
    SFT_PLOTS,
    VALUE_PLOTS,
    Plot,
    file_name,
    profile_points,
)
from megatron_vcppo.report.run_data import LARGEST, RunData, setting
from megatron_vcppo.report.run_outcomes import OUTCOMES, outcome_of

Points = Sequence[tuple[float, float | None]]
PLOTS = {"ppo": PPO_PLOTS, "value_pretrain": VALUE_PLOTS, "reward_model": REWARD_MODEL_PLOTS, "sft": SFT_PLOTS}
PLOTS_OF_EXPERIMENTS = {
    "critic/mc_error": Plot("Squared error against Monte-Carlo returns", "critic/mc_error", "", negative=False),
}
"""Of PPO, besides those of every run's page."""
LONGEST_NAME = 40
"""Characters of the name of lines that are equal."""
OVER_SEEDS = "mean; shaded: one standard error over the seeds"


def experiment_charts(results: ExperimentResults) -> list[Chart]:
    """Every figure of the question that has something to show."""
    drawn = (_chart(figure, results) for figure in results.question.figures)
    return [chart for chart in drawn if chart is not None]


def empty_figures(results: ExperimentResults) -> list[dict[str, Any]]:
    """The figures of the question for which no run has numbers, such as one whose metric is misspelled."""
    return [figure for figure in results.question.figures if _chart(figure, results) is None]


def _chart(figure: Mapping[str, Any], results: ExperimentResults) -> Chart | None:
    if "curve" in figure:
        return _curves(figure["curve"], figure.get("stage", "ppo"), results)
    if "profile" in figure:
        return _profiles(figure["profile"], results)
    if "scatter" in figure:
        x_name, y_name = figure["scatter"]
        return _scatter(x_name, y_name, results)
    return _against_setting(figure["setting"], figure["outcome"], results)


def over_seeds(lines: Sequence[Points]) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """(x, mean) and (x, mean - error, mean + error) of several seeds' points, at each x that any of them has."""
    values: dict[float, list[float]] = {}
    for line in lines:
        for x, y in line:
            if y is not None:
                values.setdefault(x, []).append(y)
    means = {x: mean_over(values[x]) for x in sorted(values)}
    band = [(x, m.value - m.error, m.value + m.error) for x, m in means.items() if m.error is not None]
    return [(x, m.value) for x, m in means.items()], band


def equal_as_one(lines: Sequence[Line]) -> list[Line]:
    """Arms that have not parted yet are one line with both names: the one drawn last would hide the others."""
    groups: list[list[Line]] = []
    for line in lines:
        group = next((one for one in groups if (one[0].points, one[0].band) == (line.points, line.band)), None)
        if group is None:
            groups.append([line])
        else:
            group.append(line)
    return [replace(group[0], name=_name_of_all([line.name for line in group])) for group in groups]


def _name_of_all(names: Sequence[str]) -> str:
    whole = " = ".join(names)
    return whole if len(whole) <= LONGEST_NAME or len(names) == 1 else f"{names[0]} and {len(names) - 1} equal"


def _runs_of(results: ExperimentResults, arm: str) -> list[ExperimentRun]:
    return [run for run in results.runs if run.arm == arm]


def _curves(metric: str, stage: str, results: ExperimentResults) -> Chart | None:
    known = next((one for one in PLOTS.get(stage, ()) if one.metric == metric), None)
    plot = known or PLOTS_OF_EXPERIMENTS.get(metric, Plot(metric, metric, ""))
    lines = []
    for arm in results.question.arms:
        points, band = over_seeds([run.data.series(stage, metric) for run in _runs_of(results, arm)])
        if points:
            lines.append(Line(arm, arm_color(results.question, arm), points, band))
    if not lines:
        return None
    title = plot.title if stage == "ppo" else f"{plot.title}, {stage}"
    x_label = "iteration" if stage == "ppo" else "step"
    content = Lines(equal_as_one(lines), plot.reference, negative=plot.negative)
    caption = "; ".join(text for text in (plot.caption.partition(";")[0], OVER_SEEDS) if text)
    return _made(title, caption, x_label, plot.title, content)


def _profiles(name: str, results: ExperimentResults) -> Chart | None:
    """Of the first iteration, when the actor of every arm is the same."""
    lines = []
    for arm in results.question.arms:
        found = [
            profile_points(run.data.config, name, run.data.profiles[0][name])
            for run in _runs_of(results, arm)
            if run.data.profiles and run.data.profiles[0].get(name)
        ]
        points, band = over_seeds(found)
        if points:
            lines.append(Line(arm, arm_color(results.question, arm), points, band))
    if not lines:
        return None
    what, _, kind = name.partition("_by_")
    x_label = "decile of the response's length" if kind == "decile" else "token of the response"
    title = f"{what.capitalize()} by {kind}, first iteration"
    return _made(title, OVER_SEEDS, x_label, what.capitalize(), Lines(equal_as_one(lines), reference=0.0))


def _scatter(x_name: str, y_name: str, results: ExperimentResults) -> Chart | None:
    """One point per run."""
    lines = []
    for arm in results.question.arms:
        pairs = [(_shown(x_name, run), _shown(y_name, run)) for run in _runs_of(results, arm)]
        points = sorted((x, y) for x, y in pairs if x is not None and y is not None)
        if points:
            lines.append(Line(arm, arm_color(results.question, arm), points, dots=True))
    if not lines:
        return None
    content = Lines(lines, x_range=extent(x for line in lines for x, _ in line.points))
    x_label, y_label = OUTCOMES[x_name].label, OUTCOMES[y_name].label
    return _made(f"{y_label} against {x_label}", "a point per run", x_label, y_label, content)


def _against_setting(key: str, name: str, results: ExperimentResults) -> Chart | None:
    """An outcome over the values of a configuration key: mean and standard error of each arm."""
    lines = []
    for arm in results.question.arms:
        found = [(_setting_of(run.data, key), _shown(name, run)) for run in _runs_of(results, arm)]
        pairs = [(float(x), y) for x, y in found if isinstance(x, int | float) and abs(x) <= LARGEST and y is not None]
        points, band = over_seeds([pairs])
        if points:
            lines.append(Line(arm, arm_color(results.question, arm), points, band, dots=True))
    if not lines:
        return None
    content = Lines(lines, x_range=extent(x for line in lines for x, _ in line.points))
    label = OUTCOMES[name].label
    return _made(f"{label} by {key}", "mean; bars: one standard error over the seeds", key, label, content)


def _setting_of(run: RunData, key: str) -> Any:
    """The value of a key; of a stage that the run does not have 0 steps, and None of its other keys."""
    section, _, name = key.partition(".")
    if section in PLOTS and section not in run.stages:
        return 0 if name == "steps" else None
    return setting(run.config, key)


def _shown(name: str, run: ExperimentRun) -> float | None:
    """An outcome as its label says it: shares in percent."""
    value = outcome_of(name, run.data)
    return None if value is None else value * OUTCOMES[name].scale


def _made(title: str, caption: str, x_label: str, y_label: str, content: Lines) -> Chart:
    legend = {line.name: line.color for line in content.lines}
    return Chart(file_name(title), title, caption, x_label, y_label, content, legend)
