"""A sweep: one chain per combination of values, below one folder, and one table of what came out."""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_vcppo.errors import UserError
from slurm.run_folder import RunFolder

POINTS_NAME = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One chain of a sweep. Example: ``Point("000", ("sft.optimizer.lr=1e-5", "run.seed=0"))``."""

    name: str
    overrides: tuple[str, ...]


def points(arguments: list[str]) -> tuple[list[Point], list[str]]:
    """Split ``key=[a, b]`` from ``key=value``; returns every combination, and the fixed overrides.

    UserError if nothing varies, or a list does not parse or is empty.
    """
    fixed, axes = [], []
    for argument in arguments:
        key, sign, text = argument.partition("=")
        if not sign or not text.startswith("["):
            fixed.append(argument)
            continue
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{argument}: not a list: write {key}=[a, b]") from None
        if not values:
            raise UserError(f"{argument}: an empty list")
        axes.append([f"{key}={value}" for value in values])
    if not axes:
        raise UserError("nothing varies: give at least one key=[value, value]")
    combinations = list(itertools.product(*axes))
    width = len(str(len(combinations) - 1))
    return [Point(f"{index:0{width}}", combination) for index, combination in enumerate(combinations)], fixed


def write_points(folder: Path, made: list[Point]) -> None:
    """Record the sweep; UserError if the folder holds another one."""
    path = folder / POINTS_NAME
    text = json.dumps({point.name: list(point.overrides) for point in made}, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: another sweep lives here; choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_points(folder: Path) -> list[Point]:
    """The recorded sweep."""
    try:
        recorded = json.loads((folder / POINTS_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a sweep: it has no {POINTS_NAME}") from None
    return [Point(name, tuple(overrides)) for name, overrides in recorded.items()]


SHOWN_OF_PPO = ("rollout/accuracy", "rollout/length_mean", "critic/explained_variance")


def results(folder: Path) -> list[dict[str, object]]:
    """One row per chain: its values, the stage it is at, PPO's newest numbers (before PPO: that stage's), and what the
    evaluation found, in percent."""
    from slurm.prepare import open_run
    from slurm.status import run_status

    rows = []
    for point in read_points(folder):
        run = RunFolder(folder / point.name)
        row: dict[str, object] = {"run": point.name, **dict(override.split("=", 1) for override in point.overrides)}
        if run.config.exists():
            _, config = open_run(run.path)
            reached = [status for status in run_status(run, config) if status.attempts]
            if reached:
                row |= {"stage": reached[-1].stage, "state": reached[-1].state}
                newest = (run.metrics("ppo") or [{}])[-1]
                row |= {name: newest[name] for name in SHOWN_OF_PPO if name in newest} or reached[-1].metrics
            row |= evaluation(run.stage("evaluate") / "results.json")
        rows.append(row)
    return rows


def evaluation(path: Path) -> dict[str, object]:
    """Example: ``{"avg of sft": "45.3 ± 4.3", "avg of ppo": "83.4 ± 3.2"}``; empty before the evaluation is done."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {f"avg of {row['name']}": f"{100 * row['avg']:.1f} ± {100 * row['avg_interval']:.1f}" for row in found}


def text_table(rows: list[dict[str, object]]) -> str:
    """Rows of possibly different columns as aligned text."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [columns, *([cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
