"""Configurations of small chains, as users write them."""

from pathlib import Path

import yaml

from tools.benchmarks._tiny_chains import tiny_model


def write_sft_recipe(folder: Path) -> Path:
    """A chain of one SFT for a cluster, with its model, and data that is empty; its run is ``folder/run``."""
    (folder / "data.jsonl").touch()
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"hf": str(tiny_model(folder / "model"))},
        "sft": {"train": str(folder / "data.jsonl")},
        "stages": ["sft"],
        "cluster": {"name": "big"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
