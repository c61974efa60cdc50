"""The charts of a report: which metrics are drawn, and how several runs share one chart."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vcppo.integers import ceil_div
from megatron_vcppo.report.chart_data import Chart, Line, Lines, Stack, extent, group_size
from megatron_vcppo.report.run_data import RunData, setting
from megatron_vcppo.report.text_table import short

MOST_BARS = 60
"""More iterations than this are averaged in groups."""
PHASE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7b3294", "#f0e442", "#8c6d31")
"""Okabe and Ito's, and two more."""
OTHER = "other"
"""Time of an iteration that no phase accounts for."""
AGES = ("#86a8ea", "#4473d6", "#14337f")
"""First, middle, last iteration: darker is later."""


@dataclass(frozen=True)
class Plot:
    """One metric of one stage over its iterations, a line per run."""

    title: str
    metric: str
    caption: str
    band: tuple[str, str] | None = None
    """Metrics of the lower and upper edge of a shaded range; drawn if there is one run."""
    reference: float | None = None
    evaluation: str | None = None
    """A metric drawn as points next to the line, with METRIC_interval as error bars if it was logged."""
    negative: bool = True
    """False: values below 0 are impossible, so the axis does not start below 0."""
    if_any: bool = False
    """Drawn only if it is ever other than 0."""


PPO_PLOTS = (
    Plot("Reward", "rollout/reward_mean", "mean over the iteration's rollouts"),
    Plot(
        "Accuracy (pass@1)",
        "rollout/accuracy",
        "line: the sampled responses; points with 95 % intervals: held-out problems",
        evaluation="evaluation/avg",
        negative=False,
    ),
    Plot("Reward model's score", "model_reward/score_mean", "mean over the iteration's rollouts, before normalization"),
    Plot(
        "Score and verdict",
        "model_reward/verifier_correlation",
        "correlation of the reward model's score with the verifier's reward; at 0 or below it rewards what is wrong",
        reference=0.0,
    ),
    Plot(
        "Score and length",
        "model_reward/length_correlation",
        "correlation of the reward model's score with the response's length; near 1 it rewards length",
        reference=0.0,
    ),
    Plot(
        "Response length",
        "rollout/length_mean",
        "tokens, mean; shaded: 10th to 90th percentile",
        band=("rollout/length_p10", "rollout/length_p90"),
        negative=False,
    ),
    Plot("Truncated responses", "rollout/truncated_share", "share that reached the token limit", negative=False),
    Plot(
        "Unfinished responses",
        "rollout/unfinished_share",
        "share of the batch that the next iteration continues",
        negative=False,
        if_any=True,
    ),
    Plot(
        "Explained variance",
        "critic/explained_variance",
        "of the returns by the critic, before the update; 0: no better than a constant, 1: exact",
        reference=0.0,
    ),
    Plot("Value loss", "critic/value_loss", "mean over the iteration's critic updates", negative=False),
    Plot(
        "Value of the first token",
        "critic/value_first_token",
        "what the critic expects before anything is written; compare with the mean reward",
    ),
    Plot(
        "Advantage of giving up",
        "actor/give_up_advantage_sigma",
        "of ending the thinking in a wrong response, in standard deviations; above 0 the actor learns to stop early",
        reference=0.0,
    ),
    Plot(
        "Early minus late advantage",
        "actor/advantage_early_late_gap",
        "first two deciles of a response minus the last two; far from 0: the position decides, not the token",
        reference=0.0,
    ),
    Plot("KL of the update", "actor/approx_kl", "between the actor before and during its updates", negative=False),
    Plot("KL from the start", "actor/kl_ref", "between the actor and the one that the stage began with", reference=0.0),
    Plot(
        "Log-prob gap",
        "rollout/logprob_gap",
        "mean |trainer − engine| of sampled tokens; a jump means that weights or kernels disagree",
        negative=False,
    ),
    Plot("Entropy", "actor/entropy", "nats per response token", negative=False),
    Plot("Clipped share", "actor/clip_fraction", "tokens whose probability ratio was clipped", negative=False),
    Plot("Gradient norm, actor", "actor/grad_norm", "before clipping", negative=False),
    Plot("Gradient norm, critic", "critic/grad_norm", "before clipping", negative=False),
    Plot("Fullest expert", "actor/router_max_load", "its tokens, relative to the mean over experts", negative=False),
    Plot("Other experts", "actor/router_mismatch", "tokens × layers that the engine routed otherwise", negative=False),
    Plot(
        "Verifiers too slow", "rollout/verifier_timeouts", "answers; each counts as wrong", negative=False, if_any=True
    ),
    Plot(
        "Verifiers that failed", "rollout/verifier_errors", "answers; each counts as wrong", negative=False, if_any=True
    ),
)
VALUE_PLOTS = (
    Plot("Explained variance", "critic/explained_variance", "of Monte-Carlo returns, before each step", reference=0.0),
    Plot("Value loss", "critic/value_loss", "½ (V − R)², mean over response tokens", negative=False),
    Plot("Accuracy of the policy", "rollout/accuracy", "it is fixed here: this should stay level", negative=False),
)
REWARD_MODEL_PLOTS = (
    Plot("Loss", "reward_model/reward_model_loss", "of the step's responses", negative=False),
    Plot("Accuracy", "reward_model/accuracy", "share of responses, or pairs, judged rightly", negative=False),
)
SFT_PLOTS = (
    Plot(
        "Loss",
        "sft/loss",
        "nats per response token; points: validation set",
        evaluation="sft/validation_loss",
        negative=False,
    ),
    Plot("Entropy", "sft/entropy", "nats per response token", negative=False),
    Plot("Learning rate", "sft/learning_rate", "", negative=False),
    Plot("Throughput", "sft/tokens_per_s", "tokens per second; a step that validates takes longer", negative=False),
)
STAGE_PLOTS = {
    "value_pretrain": ("Value pretraining", VALUE_PLOTS, "step"),
    "reward_model": ("Reward model", REWARD_MODEL_PLOTS, "step"),
    "sft": ("Supervised fine-tuning", SFT_PLOTS, "step"),
}


def charts_of(runs: Sequence[RunData]) -> list[Chart]:
    """Every chart of a report, in its order: what ``vcppo report --figures`` writes."""
    drawn = metric_charts(runs, "ppo", PPO_PLOTS, "iteration")
    drawn += [*profile_charts(runs, "advantage"), *profile_charts(runs, "value"), *time_charts(runs)]
    for stage, (_, plots, x_label) in STAGE_PLOTS.items():
        drawn += metric_charts(runs, stage, plots, x_label)
    return drawn


def metric_charts(runs: Sequence[RunData], stage: str, plots: Sequence[Plot], x_label: str) -> list[Chart]:
    """One chart per plot whose metric any run has."""
    drawn = (_metric_chart(runs, stage, plot, x_label) for plot in plots)
    return [chart for chart in drawn if chart is not None]


def _metric_chart(runs: Sequence[RunData], stage: str, plot: Plot, x_label: str) -> Chart | None:
    lines, num_lost = [], 0
    for run in runs:
        points = run.series(stage, plot.metric)
        num_lost += sum(not math.isfinite(y) for _, y in points)
        if plot.if_any and not any(y for _, y in points):
            continue
        if any(math.isfinite(y) for _, y in points):
            band = _band(run, stage, plot.band) if plot.band and len(runs) == 1 else ()
            lines.append(Line(run.name, run.color, points, band))
        if plot.evaluation:
            lines += _evaluation(run, stage, plot.evaluation)
    if not lines:
        return None
    caption = [plot.caption] if plot.caption else []
    if (size := group_size(max(len(line.points) for line in lines))) > 1:
        caption.append(f"each point is the mean of {size} {x_label}s")
    if num_lost:
        caption.append(f"{num_lost} values that are not finite are not drawn")
    return Chart(
        name=file_name(stage, plot.title),
        title=plot.title,
        caption="; ".join(caption),
        x_label=x_label,
        y_label=plot.title,
        content=Lines(lines, plot.reference, negative=plot.negative),
        legend={line.name: line.color for line in lines if not line.dots} if len(runs) > 1 else {},
    )


def _band(run: RunData, stage: str, names: tuple[str, str]) -> list[tuple[float, float, float]]:
    low, high = (dict(run.series(stage, name)) for name in names)
    return [(x, low[x], high[x]) for x in low if x in high]


def _evaluation(run: RunData, stage: str, metric: str) -> list[Line]:
    points, widths = run.series(stage, metric), dict(run.series(stage, f"{metric}_interval"))
    band = [(x, y - widths[x], y + widths[x]) for x, y in points if x in widths]
    return [Line(f"{run.name}, held out", run.color, points, band, dots=True)] if points else []


def profile_charts(runs: Sequence[RunData], what: str) -> list[Chart]:
    """Advantage or value by position and by decile of each run: its first, middle and last iteration.

    All runs have the same axes for a quantity, so that they can be compared.
    """
    drawn = []
    for kind, x_label in (("position", "token of the response"), ("decile", "decile of the response's length")):
        name, title = f"{what}_by_{kind}", f"{what.capitalize()} by {kind}"
        lines = {run.name: _profile_lines(run, name) for run in runs}
        lines = {run_name: found for run_name, found in lines.items() if found}
        points = [point for found in lines.values() for line in found for point in line.points]
        for number, (run_name, found) in enumerate(lines.items(), start=1):
            content = Lines(
                lines=found,
                reference=0.0,
                x_range=extent((x for x, _ in points), margin=0.0),
                y_range=extent([0.0, *(y for _, y in points)]),
            )
            drawn.append(
                Chart(
                    name=file_name(name, f"{number} {run_name}" if len(runs) > 1 else ""),
                    title=title if len(runs) == 1 else f"{title}: {run_name}",
                    caption="",
                    x_label=x_label,
                    y_label=what.capitalize(),
                    content=content,
                    legend={line.name: line.color for line in found},
                )
            )
    return drawn


def _profile_lines(run: RunData, name: str) -> list[Line]:
    known = [record for record in run.profiles if record.get(name)]
    picked = {record["iteration"]: record for record in (known[:1] + known[len(known) // 2 :][:1] + known[-1:])}
    lines = []
    for age, record in enumerate(picked.values()):
        color = AGES[-1] if age == len(picked) - 1 else AGES[age]
        lines.append(Line(f"iteration {record['iteration']}", color, profile_points(run.config, name, record[name])))
    return lines


def profile_points(
    config: dict[str, Any], name: str, means: Sequence[float | None]
) -> list[tuple[float, float | None]]:
    """Bins to x: the middle of each bin in tokens, or the number of the decile. Empty bins at the end are dropped."""
    width, offset = 1.0, 1.0
    if name.endswith("_by_position"):
        width = max(1, ceil_div(int(setting(config, "rollout.max_tokens") or len(means)), len(means)))
        offset = width / 2
    last = max((i for i, mean in enumerate(means) if mean is not None), default=-1)
    return [(offset + i * width, mean) for i, mean in enumerate(means[: last + 1])]


def time_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Seconds of each phase of a PPO iteration, stacked, with their means in the legend: one chart per run."""
    if len(runs) == 1:
        drawn = [_time_chart(runs[0], "time_per_phase", "PPO iteration")]
    else:
        drawn = [
            _time_chart(run, file_name("time_per_phase", f"{number} {run.name}"), run.name)
            for number, run in enumerate(runs, start=1)
        ]
    return [chart for chart in drawn if chart is not None]


def _time_chart(run: RunData, name: str, title: str) -> Chart | None:
    rows = [row for row in run.history.get("ppo", []) if "time/iteration_s" in row]
    if not rows:
        return None
    metrics = {_phase(metric): metric for row in rows for metric in row if _is_phase(metric)}
    size = group_size(len(rows), MOST_BARS)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    means = [_phase_means(group, metrics) for group in groups]
    totals, whole = _phase_means(rows, metrics), _mean(rows, "time/iteration_s")
    colors = {phase: PHASE_COLORS[i % len(PHASE_COLORS)] for i, phase in enumerate(metrics)} | {OTHER: "#adb5bd"}
    return Chart(
        name=name,
        title=title,
        caption=f"seconds of each iteration, mean {short(whole)}"
        if size == 1
        else f"seconds of an iteration, mean {short(whole)}; a bar is the mean of {size} iterations",
        x_label="iteration",
        y_label="seconds",
        content=Stack(
            edges=[*(group[0]["iteration"] - 0.5 for group in groups), rows[-1]["iteration"] + 0.5],
            layers={phase: [group[phase] for group in means] for phase in totals},
            colors=colors,
        ),
        legend={
            f"{phase} {short(seconds)} s ({100 * seconds / max(whole, 1e-9):.0f} %)": colors[phase]
            for phase, seconds in totals.items()
        },
    )


def _phase_means(rows: Sequence[dict[str, float]], metrics: dict[str, str]) -> dict[str, float]:
    """Phase → its mean seconds, and what remains of the iteration."""
    means = {phase: _mean(rows, metric) for phase, metric in metrics.items()}
    return means | {OTHER: max(0.0, _mean(rows, "time/iteration_s") - sum(means.values()))}


def _mean(rows: Sequence[dict[str, float]], metric: str) -> float:
    return sum(row.get(metric, 0.0) for row in rows) / len(rows)


def _is_phase(metric: str) -> bool:
    return metric.startswith("time/") and metric.endswith("_s") and metric != "time/iteration_s"


def _phase(metric: str) -> str:
    return metric.removeprefix("time/").removesuffix("_s")


def file_name(*parts: str) -> str:
    """Example: ("ppo", "Accuracy (pass@1)") → ppo_accuracy_pass_1."""
    return re.sub(r"[^a-z0-9]+", "_", " ".join(parts).lower()).strip("_")
