"""PPO iterations of a run: seconds per phase, tokens/s, padding, balance over replicas, idle time.

Reads the run that is named (``vcppo run configs/demo/vcppo.yaml`` makes one); its first iteration, which compiles and
connects, is left out.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.report.metrics import read_metrics

WORK = ("generation", "logprobs", "values", "advantages", "update", "evaluation")
"""Phases in which generation or training runs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run."""
    parser.add_argument("run_folder", type=Path, help="run folder with a ppo stage")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case: the mean iteration."""
    records = read_metrics(args.run_folder / "ppo")[1:]
    if not records:
        raise SystemExit(f"{args.run_folder}/ppo/metrics.jsonl has fewer than two iterations")

    def mean(name: str) -> float:
        return statistics.fmean(float(record.get(name, 0.0)) for record in records)

    phases = sorted({name for record in records for name in record if name.startswith("time/")})
    seconds = {name.removeprefix("time/").removesuffix("_s"): round(mean(name), 3) for name in phases}
    iteration_s = mean("time/iteration_s")
    work_s = sum(mean(f"time/{phase}_s") for phase in WORK)
    yield {
        "case": "ppo_iteration",
        "iterations": len(records),
        "seconds": seconds,
        "response_tokens": round(mean("rollout/tokens")),
        "response_tokens_per_s": round(mean("rollout/tokens") / iteration_s, 1),
        "generation_tokens_per_s": round(mean("rollout/tokens") / mean("time/generation_s"), 1),
        "padding_share": round(mean("packing/padding_share"), 4),
        "dp_imbalance": round(mean("packing/dp_imbalance"), 4),
        "idle_share": round(1 - work_s / iteration_s, 4),
    }
