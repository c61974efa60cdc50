"""A sweep: one chain per combination of values, below one folder."""

import itertools
import json
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_vcppo.config.keys import RENAMED, all_keys
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import read_json, read_text, write_text

POINTS_NAME = "sweep.json"
REPEAT = "remove the file, and give the command of the sweep again, which writes it"


@dataclass(frozen=True)
class Point:
    """One chain of a sweep. Example: ``Point("000", ("sft.optimizer.lr=1e-5", "run.seed=0"))``."""

    name: str
    overrides: tuple[str, ...]


def points(arguments: list[str]) -> tuple[list[Point], list[str]]:
    """Split ``key=[a, b]`` from ``key=value``; returns every combination, and the fixed overrides.

    A key that is a list itself, such as stages, varies over a list of lists. UserError if nothing varies, or a list
    does not parse or is empty.
    """
    fixed, axes = [], []
    for argument in arguments:
        key, sign, text = argument.partition("=")
        if not sign or not text.startswith("[[" if _is_list(key) else "["):
            fixed.append(argument)
            continue
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{argument}: not a list: write {key}=[a, b]") from None
        if not values:
            raise UserError(f"{argument}: an empty list")
        axes.append([f"{key}={value if isinstance(value, str) else json.dumps(value)}" for value in values])
    if not axes:
        raise UserError("nothing varies: give at least one key=[value, value]")
    combinations = list(itertools.product(*axes))
    width = len(str(len(combinations) - 1))
    return [Point(f"{index:0{width}}", combination) for index, combination in enumerate(combinations)], fixed


def _is_list(name: str) -> bool:
    key = all_keys().get(RENAMED.get(name, name))
    if key is None:
        return False
    return any(typing.get_origin(kind) is list for kind in (key.annotation, *typing.get_args(key.annotation)))


def write_points(folder: Path, made: list[Point]) -> None:
    """Record the sweep; UserError if the folder holds another one."""
    path = folder / POINTS_NAME
    text = json.dumps({point.name: list(point.overrides) for point in made}, indent=1)
    if path.exists() and read_text(path) != text:
        raise UserError(f"{path}: another sweep lives here; choose another run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def read_points(folder: Path) -> list[Point]:
    """The recorded sweep. UserError for a file that is none: what it holds names folders and becomes columns."""
    path = folder / POINTS_NAME
    try:
        recorded = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a sweep: it has no {POINTS_NAME}") from None
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict):
        raise UserError(f"{path}: damaged: not the points of a sweep: {REPEAT}")
    for name, overrides in recorded.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{path}: damaged: {name!r} is no name of a point: {REPEAT}")
        if not isinstance(overrides, list) or not all(isinstance(each, str) and "=" in each for each in overrides):
            raise UserError(f"{path}: damaged: point {name} is no list of key=value: {REPEAT}")
    return [Point(name, tuple(overrides)) for name, overrides in recorded.items()]
