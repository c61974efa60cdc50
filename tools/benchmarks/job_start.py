"""From the start of a job to the stage's first iteration, by phase, read from the folder of a run."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm import events
from slurm.run_folder import RunFolder

READY = re.compile(r"ready after ([\d.]+) s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder; first attempts without a resume count")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per stage. Engines start while the trainer imports and loads: the phases overlap."""
    folder = RunFolder(args.folder.absolute())
    attempts = [event for event in events.read(folder.path) if event["event"] == "attempt"]
    for event in (event for event in attempts if event["attempt"] == "attempt_1"):
        stage, began = event["stage"], event["time"]
        jobs = [job["time"] for job in events.of_stage(folder.path, "job", stage) if job["time"] <= began]
        records = [record for record in folder.metrics(stage) if record.get("iteration") == 1]
        ready = [
            float(seconds)
            for log in (folder.stage(stage) / "logs" / "attempt_1").glob("rollout_*.log")
            for seconds in READY.findall(log.read_text(errors="replace"))
        ]
        yield {
            "stage": stage,
            "nodes_checked_s": round(began - max(jobs), 2) if jobs else None,
            "engines_ready_s": max(ready, default=None),
            "first_iteration_s": round(records[0]["timestamp"] - began, 2) if records else None,
        }
