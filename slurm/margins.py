"""When to ask the trainer to save: from the checkpoint and iteration times that the run itself measured."""

import time
from collections.abc import Callable
from datetime import datetime

from slurm.query import show_job
from slurm.run_folder import RunFolder

SIGNAL_JITTER_S = 60
"""Slurm sends its signal up to this much early or late."""


def save_margin_s(run: RunFolder, stage: str, default_s: int) -> int:
    """Seconds before the time limit: twice the slowest checkpoint, the slowest iteration, and Slurm's jitter.

    Without a measured checkpoint of this stage: the default of the profile.
    """
    records = run.metrics(stage)
    saves = [record["time/checkpoint_s"] for record in records if "time/checkpoint_s" in record]
    if not saves:
        return default_s
    iterations = [record["time/iteration_s"] for record in records if "time/iteration_s" in record]
    return round(2 * max(saves) + max(iterations, default=0.0)) + SIGNAL_JITTER_S


def job_end_time(job_id: str) -> float:
    """When the job's time limit ends it, seconds since the epoch; infinity if it has none."""
    record = show_job(job_id) or {}
    try:
        return datetime.fromisoformat(record["EndTime"]).timestamp()
    except (KeyError, ValueError):
        return float("inf")


def save_clock(run: RunFolder, stage: str, end_time: float, default_s: int) -> Callable[[], bool]:
    """A function that becomes true when it is time to save; it looks at the measurements every 10 s."""
    state = {"checked": 0.0, "margin": float(default_s)}

    def due() -> bool:
        now = time.time()
        if now - state["checked"] > 10:
            state["checked"], state["margin"] = now, float(save_margin_s(run, stage, default_s))
        return now > end_time - state["margin"]

    return due
