"""How long a stage's iterations take, from its metrics log: when it will be done, and when to ask it to save."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from itertools import pairwise

from slurm import events
from slurm.query import Unreachable, patiently, show_job
from slurm.run_folder import RunFolder

SIGNAL_JITTER_S = 60
STOP_S = 10
"""To end the ranks and requeue the job."""


def iteration_seconds(run: RunFolder, stage: str) -> list[float]:
    """Seconds from record to record of metrics.jsonl: an iteration, with its checkpoint where it saved one.

    Times across which a new attempt began are left out: they hold the wait in the queue.
    """
    stamps = [record["timestamp"] for record in run.metrics(stage) if "timestamp" in record]
    begun = [event["time"] for event in events.of_stage(run.path, "attempt", stage)]
    return [
        after - before for before, after in pairwise(stamps) if not any(before <= start <= after for start in begun)
    ]


def save_margin_s(run: RunFolder, stage: str, default_s: int) -> int:
    """Seconds before the time limit at which to ask for a save: twice the longest iteration with its checkpoint.

    Until the stage has saved a checkpoint: the default of the profile.
    """
    measured = iteration_seconds(run, stage)
    if not measured or run.checkpoint_iteration(stage) is None:
        return default_s
    return round(2 * max(measured)) + STOP_S


def signal_margin_s(run: RunFolder, stage: str, default_s: int, limit_s: int) -> int:
    """The margin of Slurm's own signal, which comes up to a minute early or late; at most half of the time limit."""
    return min(save_margin_s(run, stage, default_s) + SIGNAL_JITTER_S, limit_s // 2)


def job_end_time(job_id: str) -> float:
    """When the job's time limit ends it, seconds since the epoch; infinity if it has none, or Slurm does not say."""
    record: dict[str, str] | None = None
    with suppress(Unreachable):
        record = patiently(lambda: show_job(job_id))
    try:
        return datetime.fromisoformat((record or {})["EndTime"]).timestamp()
    except (KeyError, ValueError):
        return float("inf")


def save_clock(run: RunFolder, stage: str, end_time: float, default_s: int) -> Callable[[], bool]:
    """A function that becomes true when it is time to save; it looks at the measurements every 10 s.

    It never asks within the first half of the time that is left at the start.
    """
    earliest = (time.time() + end_time) / 2
    checked, margin = 0.0, float(default_s)

    def due() -> bool:
        nonlocal checked, margin
        now = time.time()
        if now - checked > 10:
            checked, margin = now, float(save_margin_s(run, stage, default_s))
        return now > max(earliest, end_time - margin)

    return due
