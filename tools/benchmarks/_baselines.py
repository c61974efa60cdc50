"""Results of benchmarks kept in a file, and a later run's ratios to them.

The file is JSON: command (name and options) → {"machine": text, "cases": [case, …]}.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vcppo.run.files import write_json

FILE = Path(__file__).with_name("baselines.json")


def read_baselines(path: Path) -> dict[str, Any]:
    """Empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep_baseline(path: Path, command: str, cases: list[dict[str, Any]]) -> None:
    """Store the cases of a command in place of those before."""
    entry = {"machine": f"{os.cpu_count()} × {platform.machine()}", "cases": cases}
    write_json(path, dict(sorted((read_baselines(path) | {command: entry}).items())))


def ratios(case: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """This case's numbers over those of the stored one, of which neither is 0; nested ones by their dotted name."""
    now, then = _numbers(case, ""), _numbers(before, "")
    return {name: round(value / then[name], 3) for name, value in now.items() if value and then.get(name)}


def _numbers(case: Mapping[str, Any], prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in case.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found
