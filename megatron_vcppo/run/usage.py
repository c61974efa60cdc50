"""What runs take: the runs below a folder, their sizes on disk, the GPU-hours that their stages held."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vcppo.run.folder import RunFolder

WITHIN_A_JOB = ("attempt", "attempt_end", "save_requested", "requeue", "stage_done", "gave_up", "refused")


def runs_below(folder: Path) -> Iterator[RunFolder]:
    """Every run below a folder, or the folder itself, by name: a folder with a configuration and events.

    Folders inside a run are not looked at, links are not followed.
    """
    run = RunFolder(folder)
    try:
        if run.config.is_file() and run.events.is_file():
            yield run
            return
        entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:  # someone else's, or gone meanwhile
        return
    for name in entries:
        yield from runs_below(folder / name)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; one with several names counts once, links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size if path.exists() else 0
    sizes: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                found = os.lstat(os.path.join(folder, name))
            except OSError:  # removed meanwhile
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def gpu_hours(mine: Sequence[Mapping[str, Any]], gpus: int, now_s: float | None) -> float:
    """Hours that a stage's jobs held GPUs, times their number.

    Counted from the start of each job (here: of each attempt) to its last event, so that what Slurm ended without a
    word counts less than it took.

    Args:
        mine: the events of the stage, in order.
        gpus: GPUs of its allocation, for jobs whose event does not say so.
        now_s: seconds since the epoch if the stage is running, else None.
    """
    total, begun, ended, held, in_job = 0.0, 0.0, 0.0, 0, False  # max(): clocks of nodes differ
    for event in mine:
        kind = event["event"]
        if kind == "job" or (kind == "attempt" and not in_job):
            total += held * max(0.0, ended - begun)
            in_job = kind == "job"
            said = event.get("gpus")
            held, begun, ended = said if isinstance(said, int) else gpus, event["time"], event["time"]
        elif kind in WITHIN_A_JOB:
            ended = event["time"]
        elif kind == "submitted":
            total += held * max(0.0, ended - begun)
            held, in_job = 0, False
    if now_s is not None:
        ended = now_s
    return (total + held * max(0.0, ended - begun)) / 3600
