"""Time to submit a chain of six stages to a real Slurm, and to show its status."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.slurm.devcluster import DevCluster
from tools.benchmarks._tiny_chains import tiny_model

STAGES = ("sft", "reward_model", "value_pretrain", "ppo", "evaluate", "export")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--repeats: how often each is timed."""
    parser.add_argument("--repeats", type=int, default=3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The whole command each time, from the interpreter's start to its end."""
    folder = Path(tempfile.mkdtemp(prefix="vcppo_latency_"))
    folder.chmod(0o755)
    cluster = DevCluster(folder / "slurm", tied=True)
    cluster.up(nodes=3)
    os.environ |= cluster.environment
    subprocess.run(["scontrol", "update", "PartitionName=main", "State=DOWN"], check=True)  # jobs stay queued
    config = folder / "config.yaml"
    tiny_model(folder)
    config.write_text(
        f"run: {{dir: {folder}/run}}\nmodel: {{hf: {folder}}}\nsft: {{train: {folder}}}\nprompts: {{train: {folder}}}\n"
        f"stages: [{', '.join(STAGES)}]\n"
    )
    commands = {
        "submit": ["submit", str(config), "--cluster", "devcluster", "cluster.trainer_ranks=2"],
        "status": ["status", f"{folder}/run"],
        "cancel": ["cancel", f"{folder}/run"],
    }
    try:
        for repeat in range(args.repeats):
            for name, arguments in commands.items():
                started = time.monotonic()
                done = subprocess.run(
                    [sys.executable, "-m", "megatron_vcppo.cli", *arguments], capture_output=True, text=True
                )
                seconds = time.monotonic() - started
                if done.returncode:
                    raise RuntimeError(f"vcppo {name}: {done.stderr}")
                yield {"command": name, "stages": len(STAGES), "repeat": repeat, "seconds": round(seconds, 3)}
    finally:
        cluster.down()
