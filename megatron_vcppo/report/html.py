"""One self-contained HTML page about one run, or several beside each other: no script, nothing from the network."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from megatron_vcppo.report.plots import (
    PPO_PLOTS,
    STAGE_PLOTS,
    figures,
    profile_figures,
    time_figure,
)
from megatron_vcppo.report.run_data import RunData, differences
from megatron_vcppo.report.samples import show
from megatron_vcppo.report.style import CSS
from megatron_vcppo.report.svg import short


def render(runs: Sequence[RunData]) -> str:
    """The page."""
    sections: list[tuple[str, str, Callable[[Sequence[RunData]], str]]] = [
        ("stages", "Stages", _stages),
        ("diagnosis", "Diagnosis", _diagnosis),
        ("evaluation", "Evaluation", _evaluation),
        ("ppo", "PPO", _ppo),
        ("positions", "Advantages and values by position", _positions),
        ("time", "Time per phase", _time),
        *((stage, title, _stage_section(stage)) for stage, (title, _, _) in STAGE_PLOTS.items()),
        ("rollouts", "Sample rollouts", _rollouts),
        ("configuration", "Configuration", _configuration),
    ]
    bodies = [(key, title, section(runs)) for key, title, section in sections]
    present = [(key, title, body) for key, title, body in bodies if body]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in present)
    content = "".join(f'<h2 id="{key}">{escape(title)}</h2>{body}' for key, title, body in present)
    names = " against ".join(run.name for run in runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(names)}</h1>"
        f'<div class="soft">report of {time.strftime("%Y-%m-%d %H:%M")}</div>'
        f"<nav>{links}</nav>{content}</main></body></html>\n"
    )


def _stages(runs: Sequence[RunData]) -> str:
    stages = list(dict.fromkeys(stage for run in runs for stage in [*run.stages, *run.history]))
    rows = []
    for run in runs:
        cells = [_name(run, len(runs) > 1), *(_stage_cell(run, stage) for stage in stages)]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return _table(["run", *stages], rows)


def _stage_cell(run: RunData, stage: str) -> str:
    """State, progress, seconds and what came out."""
    rows = run.history.get(stage, [])
    if stage in run.done:
        state = '<span class="badge done">done</span>'
    elif rows:
        state = '<span class="badge running">not finished</span>'
    elif stage in run.stages:
        return '<span class="badge waiting">not started</span>'
    else:
        return '<span class="soft">not in this run</span>'
    lines = [state]
    if rows:
        last = rows[-1]
        total = f" of {last['total_iterations']}" if "total_iterations" in last else ""
        seconds = sum(row.get("time/iteration_s", row.get("time/step_s", 0.0)) for row in rows)
        lines.append(f"{last['iteration']}{total} iterations, {_duration(seconds)}")
    for label, metric in _OUTCOMES.get(stage, ()):
        values = [value for _, value in run.series(stage, metric)]
        if values:
            change = short(values[-1]) if len(values) == 1 else f"{short(values[0])} → {short(values[-1])}"
            lines.append(f"{label} {change}")
    return "<br>".join(lines)


_OUTCOMES = {
    "sft": (("loss", "sft/loss"), ("validation", "sft/validation_loss")),
    "reward_model": (("accuracy", "reward_model/accuracy"),),
    "value_pretrain": (("explained variance", "critic/explained_variance"), ("value loss", "critic/value_loss")),
    "ppo": (
        ("accuracy", "rollout/accuracy"),
        ("length", "rollout/length_mean"),
        ("explained variance", "critic/explained_variance"),
    ),
}
"""What a stage's cell says: label and metric, first → last."""


def _diagnosis(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        for finding in run.findings() if "ppo" in run.history else ():
            advice = f'<br><span class="soft">what helps: {escape(finding.advice)}</span>' if finding.advice else ""
            rows.append(
                f"<tr><td>{_name(run, len(runs) > 1)}</td>"
                f'<td><span class="badge {finding.state}">{finding.state}</span></td>'
                f"<td>{finding.signature.replace('_', ' ')}</td><td>{escape(finding.evidence)}{advice}</td></tr>"
            )
    if not rows:
        return ""
    return _table(["run", "state", "failure signature", "what the numbers say"], rows)


def _evaluation(runs: Sequence[RunData]) -> str:
    rows = [(run, row) for run in runs for row in run.results]
    if not rows:
        return ""
    ks = list(dict.fromkeys(k for _, row in rows for k in row["pass"]))
    best = max(row["avg"] for _, row in rows)
    lines = []
    for run, row in rows:
        name = f"<td>{_name(run, len(runs) > 1)}</td>"
        rank = "best" if row["avg"] == best else "other"
        lines.append(f'<tr class="{rank}">{name}<td>{escape(row["name"])}</td>{_scores(row, ks)}</tr>')
        for task, part in row.get("tasks", {}).items():
            lines.append(f'<tr class="other"><td></td><td class="soft">{escape(task)}</td>{_scores(part, ks)}</tr>')
    note = '<p class="soft">Held-out problems; ± is the half-width of a 95 % interval.</p>'
    heads = ["run", "actor of", *["avg", *(f"pass@{k}" for k in ks), "mean length", "cut"]]
    return note + _table(heads, lines, first_number=2)


def _scores(row: Mapping[str, Any], ks: Sequence[str]) -> str:
    """The cells of one checkpoint, or of one of its tasks."""
    numbers = [_percent(row["avg"], row["avg_interval"])]
    numbers += [_percent(*row["pass"][k]) if k in row["pass"] else "" for k in ks]
    numbers += [f"{row['length_mean']:.1f}", f"{100 * row['truncated_share']:.1f} %"]
    return "".join(f'<td class="number">{number}</td>' for number in numbers)


def _ppo(runs: Sequence[RunData]) -> str:
    drawn = figures(runs, "ppo", PPO_PLOTS, "iteration")
    if drawn:
        return _panels(drawn)
    planned = [run.name for run in runs if "ppo" in run.stages]
    return '<p class="soft">The PPO stage has not logged an iteration yet.</p>' if planned else ""


def _positions(runs: Sequence[RunData]) -> str:
    drawn = [*profile_figures(runs, "advantage"), *profile_figures(runs, "value")]
    if not drawn:
        return ""
    note = (
        '<p class="soft">Mean over the response tokens of an iteration, advantages before whitening. A sound critic '
        "leaves advantages near 0 at every position; a slope means that the place of a token is rewarded, not what it "
        "says.</p>"
    )
    return note + _panels(drawn, columns=2 if len(runs) == 1 else min(len(runs), 4))


def _time(runs: Sequence[RunData]) -> str:
    titles = {run.name: run.name if len(runs) > 1 else "PPO iteration" for run in runs}
    return _panels([drawn for run in runs if (drawn := time_figure(run, titles[run.name]))])


def _stage_section(stage: str) -> Callable[[Sequence[RunData]], str]:
    _, plots, x_label = STAGE_PLOTS[stage]
    return lambda runs: _panels(figures(runs, stage, plots, x_label))


def _rollouts(runs: Sequence[RunData]) -> str:
    parts = []
    for run in runs:
        if run.samples and len(runs) > 1:
            parts.append(f"<p>{_name(run, True)}</p>")
        parts += [show(samples) for samples in run.samples]
    return "".join(parts)


def _configuration(runs: Sequence[RunData]) -> str:
    parts = []
    if len(runs) > 1:
        rows = [
            f"<tr><td>{escape(key)}</td>{''.join(f'<td>{escape(_text(value))}</td>' for value in values)}</tr>"
            for key, values in differences(runs).items()
        ]
        heads = ["key that differs", *(run.name for run in runs)]
        parts.append(_table(heads, rows) if rows else '<p class="soft">The configurations are equal.</p>')
    for run in runs:
        dumped = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=120)
        title = f"resolved configuration of {run.name}" if len(runs) > 1 else "resolved configuration"
        parts.append(f"<details><summary>{escape(title)}</summary><pre>{escape(dumped)}</pre></details>")
    return "".join(parts)


def _panels(drawn: Sequence[str], columns: int | None = None) -> str:
    """columns None: as many as fit."""
    style = f' style="grid-template-columns: repeat({columns}, minmax(0, 500px))"' if columns else ""
    return f'<div class="panels"{style}>{"".join(drawn)}</div>' if drawn else ""


def _table(heads: Sequence[str], rows: Iterable[str], first_number: int | None = None) -> str:
    kinds = ["text" if first_number is None or i < first_number else "number" for i in range(len(heads))]
    cells = "".join(f'<th class="{kind}">{escape(head)}</th>' for kind, head in zip(kinds, heads))
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _name(run: RunData, coloured: bool) -> str:
    key = f'<span class="key" style="background:{run.colour}"></span>' if coloured else ""
    return f'<span class="name">{key}{escape(run.name)}</span>'


def _percent(value: float, half_width: float) -> str:
    return f"{100 * value:.1f} ± {100 * half_width:.1f} %"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
