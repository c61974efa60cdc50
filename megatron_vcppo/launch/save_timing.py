"""How long iterations and saves of a stage take: when it is done, when to ask it to save, how long that may take."""

import time
from collections.abc import Callable
from itertools import pairwise

from megatron_vcppo.errors import SAVED
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.metrics_log import LONGEST_PIECE, SAVE_TIME

SIGNAL_JITTER_S = 60
STOP_S = 10
"""To end the ranks and requeue the job."""
LEAST_S = 60.0
"""A trainer that was asked to save is given at least this, if the job lasts that long."""
SAFETY = 2.0
"""Between what saving was measured to need and what it is given."""


def iteration_seconds(run: RunFolder, stage: str) -> list[float]:
    """Seconds from record to record of metrics.jsonl: an iteration, with its checkpoint where it saved one.

    Times across which a new attempt began are dropped: they include the wait in the queue.
    """
    found = [record.get("timestamp") for record in run.stage(stage).recent_metrics()]
    stamps = [stamp for stamp in found if isinstance(stamp, int | float)]
    begun = [event["time"] for event in events.of_stage(run.path, "attempt", stage)]
    return [
        after - before for before, after in pairwise(stamps) if not any(before <= start <= after for start in begun)
    ]


def measured_save_s(run: RunFolder, stage: str) -> float | None:
    """Seconds from the request until a stage has saved and left, as measured; None if nothing was measured yet.

    The longest piece of work that a stop cannot interrupt (an optimizer step, the log-probs of a batch, …) and the
    longest save, both from metrics.jsonl; until that has both, the stops of earlier attempts. A stop that was ended
    because it took too long always counts.
    """
    records = run.stage(stage).recent_metrics()
    pieces, saves = (
        [value for record in records if isinstance(value := record.get(name), int | float)]
        for name in (LONGEST_PIECE, SAVE_TIME)
    )
    ends = events.of_stage(run.path, "attempt_end", stage)
    stops = [event for event in ends if isinstance(left := event.get("leaving_s"), int | float) and left]
    known = [event["leaving_s"] for event in stops if event["code"] != SAVED or not (pieces and saves)]
    if pieces and saves:
        known.append(max(pieces) + max(saves))
    return max(known, default=None)


def save_margin_s(run: RunFolder, stage: str, default_s: int) -> int:
    """Seconds before the time limit at which to ask for a save: twice what was measured, else the profile's default."""
    needed = measured_save_s(run, stage)
    return default_s if needed is None else round(SAFETY * needed) + STOP_S


def save_allowance_s(run: RunFolder, stage: str, default_s: float, end_time: float) -> float:
    """Seconds that a trainer is given to save and leave, from now: twice what was measured, up to the job's end.

    end_time: of the job, seconds since the epoch; infinity without a time limit. As long as nothing was measured: until
    the job's end, or default_s if it has none.
    """
    needed, left = measured_save_s(run, stage), end_time - time.time() - STOP_S
    if needed is not None:
        wanted = SAFETY * needed
    else:
        wanted = left if left < float("inf") else default_s
    return max(STOP_S, min(max(LEAST_S, wanted), left))


def signal_margin_s(run: RunFolder, stage: str, default_s: int, limit_s: int) -> int:
    """The margin of Slurm's own signal, which comes up to a minute early or late; at most half of the time limit."""
    return min(save_margin_s(run, stage, default_s) + SIGNAL_JITTER_S, limit_s // 2)


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
