"""From the start of a job to the stage's first iteration, by phase, read from the folder of a run."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.run import events
from megatron_vcppo.run.events import read_startups
from megatron_vcppo.run.folder import RunFolder

READY = re.compile(r"ready after ([\d.]+) s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per attempt. The main rank's phases follow each other; the engines start at the same time.

    - controller: from the job's first line to its controller at work; nodes_checked: the probe of all nodes;
    - launch: from the order to start the roles to the main rank's process; then that rank's own phases;
    - engines_ready: how long the slowest engine took, from its own start; ``engines_s`` is what the rank waited for it.
    """
    folder = RunFolder(args.folder.absolute())
    attempts = [event for event in events.read(folder.path) if event["event"] == "attempt"]
    for event in attempts:
        stage, began = event["stage"], event["time"]
        ends = [end["time"] for end in events.of_stage(folder.path, "attempt_end", stage) if end["time"] >= began]
        end = min(ends, default=float("inf"))
        started = [start for start in read_startups(folder.stage(stage).path) if began <= start["timestamp"] < end]
        if not started:
            continue
        phases = dict(started[0])
        first_iteration_s = phases.pop("timestamp") - began
        earlier = max(
            (other["time"] for other in attempts if other["stage"] == stage and other["time"] < began), default=0
        )
        jobs = [job for job in events.of_stage(folder.path, "job", stage) if earlier < job["time"] <= began]
        ready = [
            float(seconds)
            for log in (folder.stage(stage).logs / event["attempt"]).glob("rollout_*.log")
            for seconds in READY.findall(log.read_text(errors="replace"))
        ]
        yield {
            "stage": stage,
            "attempt": event["attempt"],
            "controller_s": jobs[-1]["age_s"] if jobs else None,
            "nodes_checked_s": round(began - jobs[-1]["time"], 2) if jobs else None,
            "launch_s": round(first_iteration_s - phases.pop("total_s"), 2),
            **phases,
            "engines_ready_s": max(ready, default=None),
            "first_iteration_s": round(first_iteration_s, 2),
        }
