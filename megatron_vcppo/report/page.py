"""One self-contained HTML page about one run, or several side by side: no script, nothing from the network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_vcppo.report.drawing import page_svg
from megatron_vcppo.report.run_charts import PPO_PLOTS, STAGE_PLOTS, metric_charts, profile_charts, time_charts
from megatron_vcppo.report.run_data import RunData, differences
from megatron_vcppo.report.samples import shorten
from megatron_vcppo.report.text_table import duration, percent_interval, short
from megatron_vcppo.run.log import printable

OUTCOMES = {
    "sft": (("loss", "sft/loss"), ("validation", "sft/validation_loss")),
    "reward_model": (("accuracy", "reward_model/accuracy"),),
    "value_pretrain": (("explained variance", "critic/explained_variance"), ("value loss", "critic/value_loss")),
    "ppo": (
        ("accuracy", "rollout/accuracy"),
        ("length", "rollout/length_mean"),
        ("explained variance", "critic/explained_variance"),
    ),
}
"""Label and metric of what a stage's cell shows, first → last value."""


@dataclass(frozen=True)
class StageSummary:
    """A cell of the table of stages."""

    state: str
    style: str
    """CSS classes of the state."""
    lines: list[str]
    """Progress, seconds, and how the OUTCOMES changed."""


def render(runs: Sequence[RunData], written_at: str) -> str:
    """The page as HTML. written_at: date and time, as text."""
    charts = {
        "ppo": metric_charts(runs, "ppo", PPO_PLOTS, "iteration"),
        "positions": [*profile_charts(runs, "advantage"), *profile_charts(runs, "value")],
        "time": time_charts(runs),
        **{stage: metric_charts(runs, stage, plots, x_label) for stage, (_, plots, x_label) in STAGE_PLOTS.items()},
    }
    findings = [(run, finding) for run in runs if "ppo" in run.history for finding in run.findings()]
    results = [(run, row) for run in runs for row in run.results]
    sections = {
        "stages": ("Stages", True),
        "diagnosis": ("Diagnosis", bool(findings)),
        "evaluation": ("Evaluation", bool(results)),
        "ppo": ("PPO", bool(charts["ppo"]) or any("ppo" in run.stages for run in runs)),
        "positions": ("Advantages and values by position", bool(charts["positions"])),
        "time": ("Time per phase", bool(charts["time"])),
        **{stage: (title, bool(charts[stage])) for stage, (title, _, _) in STAGE_PLOTS.items()},
        "rollouts": ("Sample rollouts", any(run.samples for run in runs)),
        "configuration": ("Configuration", True),
    }
    return template("page.html.jinja").render(
        title=" against ".join(run.name for run in runs),
        written_at=written_at,
        runs=runs,
        several=len(runs) > 1,
        sections=[(key, title) for key, (title, present) in sections.items() if present],
        stages=list(dict.fromkeys(stage for run in runs for stage in [*run.stages, *run.history])),
        findings=findings,
        results=results,
        estimates=list(
            dict.fromkeys((kind, k) for kind in ("pass", "maj") for _, row in results for k in row.get(kind, {}))
        ),
        best_avg=max((row["avg"] for _, row in results), default=None),
        changed_keys=differences(runs),
        charts=charts,
    )


def template(name: str) -> Any:
    """A page's template, with what templates call."""
    environment = Environment(
        loader=PackageLoader("megatron_vcppo", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.globals |= {
        "stage_summary": stage_summary,
        "page_svg": page_svg,
        "percent": percent_interval,
        "shorten": shorten,
        "yaml": as_yaml,
    }
    return environment.get_template(name)


def stage_summary(run: RunData, stage: str) -> StageSummary:
    """State, progress and results of one stage."""
    rows = run.history.get(stage, [])
    if stage in run.done:
        state, style = "done", "badge done"
    elif rows:
        state, style = "not finished", "badge running"
    elif stage in run.stages:
        state, style = "not started", "badge waiting"
    else:
        state, style = "not in this run", "soft"
    lines = []
    if rows:
        last = rows[-1]
        total = f" of {last['total_iterations']}" if "total_iterations" in last else ""
        seconds = sum(row.get("time/iteration_s", row.get("time/step_s", 0.0)) for row in rows)
        lines.append(f"{last['iteration']}{total} iterations, {duration(seconds)}")
    for label, metric in OUTCOMES.get(stage, ()):
        values = [value for _, value in run.series(stage, metric)]
        if values:
            change = short(values[-1]) if len(values) == 1 else f"{short(values[0])} → {short(values[-1])}"
            lines.append(f"{label} {change}")
    return StageSummary(state, style, lines)


def as_yaml(config: dict[str, Any]) -> str:
    """The configuration as in the run's config.yaml."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
