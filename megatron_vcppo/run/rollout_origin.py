"""origin.json in a folder of rollouts: which actor and settings made them, so that others are never taken for them."""

import json
from pathlib import Path
from typing import Any

from megatron_vcppo.run.files import write_json
from megatron_vcppo.run.log import say
from megatron_vcppo.run.rollout_store import drop_partial, drop_rollouts, partial_iterations, stored_iterations
from megatron_vcppo.run.stored_set import unmark_complete

Origin = dict[str, Any]
"""Dotted key → value."""

FILE_NAME = "origin.json"


def differences(folder: Path, made: Origin) -> list[str]:
    """The keys in which what made a folder's rollouts differs; empty if nothing is recorded."""
    try:
        known = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [key for key, value in json.loads(json.dumps(made)).items() if known.get(key) != value]


def claim(folder: Path, made: Origin, reached: int) -> None:
    """Record what makes the rollouts of a folder, and delete those that no longer match. Main rank only.

    Rollouts that something else made are dropped if they belong to iterations after ``reached``: an interrupted
    iteration is trained again on the responses that it had, but not on those of another policy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if different := differences(folder, made):
        later = [iteration for iteration in stored_iterations(folder) if iteration > reached]
        if later:
            say(
                f"{folder}: iterations {later[0]} to {later[-1]} were generated under other settings "
                f"({', '.join(different)}): they are generated again"
            )
        for iteration in later:
            drop_rollouts(folder, iteration)
        # Negative: evaluations within a stage, of an actor that other settings may no longer lead to.
        for iteration in partial_iterations(folder):
            if iteration > reached or iteration < 0:
                drop_partial(folder, iteration)
        unmark_complete(folder)
    write_json(folder / FILE_NAME, made)
