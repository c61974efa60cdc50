"""The plots of a report: which metrics are drawn, and how several runs share one chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from megatron_vcppo.report.run_data import RunData, setting
from megatron_vcppo.report.svg import Bar, Line, bar_chart, line_chart, short, thin, x_extent, y_extent

MOST_BARS = 60
PHASE_COLOURS = ("#2563eb", "#e8590c", "#2f9e44", "#9c36b5", "#0c8599", "#f08c00", "#c2255c", "#5c940d", "#1864ab")
OTHER = "other"
AGES = ("#b9cdf7", "#6d97ee", "#173f9e")
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
    """A metric drawn as points beside the line, with METRIC_interval as error bars if it is there."""
    negative: bool = True
    """False: values below 0 cannot be, the axis starts at 0."""
    if_any: bool = False
    """Drawn only if it is ever other than 0."""


PPO_PLOTS = (
    Plot("Reward", "rollout/reward_mean", "mean over the iteration's rollouts"),
    Plot(
        "Accuracy (pass@1)",
        "rollout/accuracy",
        "line: the sampled responses; points with 95 % intervals: held-out problems",
        evaluation="evaluation/avg",
    ),
    Plot(
        "Response length",
        "rollout/length_mean",
        "tokens, mean; shaded: 10th to 90th percentile",
        band=("rollout/length_p10", "rollout/length_p90"),
        negative=False,
    ),
    Plot("Cut responses", "rollout/truncated_share", "share that reached the token limit", negative=False),
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
    Plot("Accuracy of the policy", "rollout/accuracy", "it is fixed here: this should stay level"),
)
REWARD_MODEL_PLOTS = (
    Plot("Loss", "reward_model/reward_model_loss", "of the step's responses", negative=False),
    Plot("Accuracy", "reward_model/accuracy", "share of responses, or pairs, judged rightly"),
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


def figures(runs: Sequence[RunData], stage: str, plots: Sequence[Plot], x_label: str) -> list[str]:
    """One figure per plot whose metric any run has."""
    drawn = (_figure_of(runs, stage, plot, x_label) for plot in plots)
    return [figure for figure in drawn if figure]


def _figure_of(runs: Sequence[RunData], stage: str, plot: Plot, x_label: str) -> str:
    lines, num_lost = [], 0
    for run in runs:
        points = run.series(stage, plot.metric)
        num_lost += sum(not math.isfinite(y) for _, y in points)
        if plot.if_any and not any(y for _, y in points):
            continue
        if any(math.isfinite(y) for _, y in points):
            band = _band(run, stage, plot.band) if plot.band and len(runs) == 1 else ()
            lines.append(Line(run.name, run.colour, points, band))
        if plot.evaluation:
            lines += _evaluation(run, stage, plot.evaluation)
    if not lines:
        return ""
    caption = plot.caption
    longest = max(len(line.points) for line in lines)
    if (size := -(-longest // len(thin([(0.0, 0.0)] * longest)))) > 1:
        caption += f"; each point is the mean of {size} {x_label}s"
    if num_lost:
        caption += f"; {num_lost} values that are not finite are left out"
    low, high = y_extent(lines, plot.reference)
    legend = {line.name: line.colour for line in lines if not line.dots} if len(runs) > 1 else {}
    chart = line_chart(lines, x_label, plot.reference, y_range=(low if plot.negative else max(low, 0.0), high))
    return figure(plot.title, caption, chart, legend=legend)


def _band(run: RunData, stage: str, names: tuple[str, str]) -> list[tuple[float, float, float]]:
    low, high = (dict(run.series(stage, name)) for name in names)
    return [(x, low[x], high[x]) for x in low if x in high]


def _evaluation(run: RunData, stage: str, metric: str) -> list[Line]:
    points, widths = run.series(stage, metric), dict(run.series(stage, f"{metric}_interval"))
    band = [(x, y - widths[x], y + widths[x]) for x, y in points if x in widths]
    return [Line(f"{run.name}, held out", run.colour, points, band, dots=True)] if points else []


def profile_figures(runs: Sequence[RunData], what: str) -> list[str]:
    """Advantage or value by position and by decile of each run: its first, middle and last iteration.

    One quantity has the same axes in all runs, so that they can be compared.
    """
    drawn = []
    for kind, title in (("position", f"{what.capitalize()} by position"), ("decile", f"{what.capitalize()} by decile")):
        name = f"{what}_by_{kind}"
        lines = {run.name: _profile_lines(run, name) for run in runs}
        lines = {run_name: found for run_name, found in lines.items() if found}
        if not lines:
            continue
        every = [line for found in lines.values() for line in found]
        ranges = x_extent(every), y_extent(every, 0.0)
        label = "token of the response" if kind == "position" else "decile of the response's length"
        for run_name, found in lines.items():
            chart = line_chart(found, label, 0.0, *ranges)
            legend = {line.name: line.colour for line in found}
            drawn.append(figure(title if len(runs) == 1 else f"{title}: {run_name}", "", chart, legend))
    return drawn


def _profile_lines(run: RunData, name: str) -> list[Line]:
    known = [record for record in run.profiles if record.get(name)]
    picked = {record["iteration"]: record for record in (known[:1] + known[len(known) // 2 :][:1] + known[-1:])}
    lines = []
    for age, record in enumerate(picked.values()):
        colour = AGES[-1] if age == len(picked) - 1 else AGES[age]
        lines.append(Line(f"iteration {record['iteration']}", colour, _profile_points(run.config, name, record[name])))
    return lines


def _profile_points(
    config: dict[str, Any], name: str, means: Sequence[float | None]
) -> list[tuple[float, float | None]]:
    """Bins to x: the middle of each bin in tokens, or the number of the decile. Empty bins at the end are left out."""
    width, offset = 1.0, 1.0
    if name.endswith("_by_position"):
        width = max(1, -(-int(setting(config, "rollout.max_tokens") or len(means)) // len(means)))
        offset = width / 2
    last = max((i for i, mean in enumerate(means) if mean is not None), default=-1)
    return [(offset + i * width, mean) for i, mean in enumerate(means[: last + 1])]


def time_figure(run: RunData, title: str) -> str:
    """Seconds of each phase of a PPO iteration as stacked bars, and their means in the legend."""
    rows = [row for row in run.history.get("ppo", []) if "time/iteration_s" in row]
    if not rows:
        return ""
    names = dict.fromkeys(name for row in rows for name in row if _is_phase(name))
    phases = {_phase(name): name for name in names}
    size = -(-len(rows) // MOST_BARS)
    bars = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        parts = {phase: sum(row.get(name, 0.0) for row in group) / len(group) for phase, name in phases.items()}
        whole = sum(row["time/iteration_s"] for row in group) / len(group)
        parts[OTHER] = max(0.0, whole - sum(parts.values()))
        bars.append(Bar(group[0]["iteration"] - 0.5, group[-1]["iteration"] + 0.5, parts))
    totals = {phase: sum(row.get(name, 0.0) for row in rows) for phase, name in phases.items()}
    whole = sum(row["time/iteration_s"] for row in rows)
    totals[OTHER] = max(0.0, whole - sum(totals.values()))
    colours = {phase: PHASE_COLOURS[i % len(PHASE_COLOURS)] for i, phase in enumerate(phases)} | {OTHER: "#adb5bd"}
    legend = {
        f"{phase} {short(seconds / len(rows))} s ({100 * seconds / max(whole, 1e-9):.0f} %)": colours[phase]
        for phase, seconds in totals.items()
    }
    caption = f"seconds of an iteration, mean {short(whole / len(rows))}; a bar is the mean of {size} iterations"
    if size == 1:
        caption = f"seconds of each iteration, mean {short(whole / len(rows))}"
    return figure(title, caption, bar_chart(bars, colours, "iteration"), legend)


def _is_phase(name: str) -> bool:
    return name.startswith("time/") and name.endswith("_s") and name != "time/iteration_s"


def _phase(name: str) -> str:
    return name.removeprefix("time/").removesuffix("_s")


def figure(title: str, caption: str, chart: str, legend: dict[str, str]) -> str:
    """A chart in its frame. legend: name → colour; caption and names are escaped."""
    keys = "".join(
        f'<span><span class="key" style="background:{colour}"></span>{escape(name)}</span>'
        for name, colour in legend.items()
    )
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f'<figcaption>{escape(caption)}</figcaption>{chart}<div class="legend">{keys}</div></figure>'
    )
