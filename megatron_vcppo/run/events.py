"""What happened to a run, appended only: RUN/events.jsonl, and in RUN/STAGE/startup.jsonl where the time between the
start of a rank's process and its first iteration went."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_vcppo.run.files import append_json_line, read_json_lines
from megatron_vcppo.run.folder import RunFolder, StageFolder
from megatron_vcppo.run.log import say

_FIELDS: dict[str, dict[str, Any]] = {
    "submitted": {"stage": str, "job": str},
    "job": {"stage": str},
    "attempt": {"stage": str},
    "attempt_end": {"stage": str, "code": int},
    "save_requested": {"stage": str, "seconds": int},
    "refused": {"stage": str},
}
"""Event → the fields that others read of it."""
_JOB = re.compile(r"\d{1,18}")
_LATEST_S = 1e11
"""Seconds since the epoch: the year 5138. Later times overflow what prints them."""


def append(run: Path, event: str, **fields: Any) -> None:
    """Append one event to a run's folder."""
    append_json_line(RunFolder(run).events, {"time": round(time.time(), 3), "event": event, **fields})


def read(run: Path) -> list[dict[str, Any]]:
    """All events in order. Lines that are none, or lack what their kind of event has, are dropped."""
    return [record for record in read_json_lines(RunFolder(run).events) if _is_event(record)]


def _is_event(record: dict[str, Any]) -> bool:
    fields = {"event": str, "time": (int, float), **_FIELDS.get(str(record.get("event")), {})}
    if not all(isinstance(record.get(name), kind) for name, kind in fields.items()):
        return False
    is_job = record["event"] != "submitted" or _JOB.fullmatch(record["job"])
    return bool(is_job) and 0 <= record["time"] < _LATEST_S


def of_stage(run: Path, event: str, stage: str) -> list[dict[str, Any]]:
    """The events of one kind about one stage, in order."""
    return [record for record in read(run) if (record["event"], record.get("stage")) == (event, stage)]


def process_age_s() -> float:
    """Seconds since this process was forked (Linux); an exec does not set it back."""
    stat = Path("/proc/self/stat").read_text()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - forked_at_s(stat, os.sysconf("SC_CLK_TCK"))


def forked_at_s(stat: str, ticks_per_s: int) -> float:
    """Seconds from the machine's start to the fork of a process, from its /proc/PID/stat."""
    return int(stat.rsplit(")", 1)[1].split()[19]) / ticks_per_s  # the name in parentheses may hold anything


class Startup:
    """The phases so far. Example: ``startup.done("groups")`` after joining the process groups."""

    def __init__(self, age_s: Callable[[], float] = process_age_s) -> None:
        self.age_s = age_s
        self.reached_s = 0.0
        self.phases: dict[str, float] = {}
        self.finished = False

    def begin_at(self, boottime_s: float) -> None:
        """Count from then on the clock CLOCK_BOOTTIME: this process was requested before it was forked."""
        self.age_s = lambda: time.clock_gettime(time.CLOCK_BOOTTIME) - boottime_s

    def done(self, phase: str) -> None:
        """What was done since the phase before, or since the process's start, was this; no-op once finished."""
        if not self.finished:
            now = self.age_s()
            self.phases[phase] = self.phases.get(phase, 0.0) + now - self.reached_s
            self.reached_s = now

    def finish(self, folder: Path) -> None:
        """The first iteration is done: write the phases to the stage's folder and print them. Main rank only."""
        if self.finished:
            return
        self.done("iteration")
        self.finished = True
        record = {"timestamp": round(time.time(), 3), "total_s": round(self.reached_s, 2)}
        record |= {f"{phase}_s": round(seconds, 2) for phase, seconds in self.phases.items()}
        append_json_line(StageFolder(folder).startup, record)
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
        say(f"{folder.name}: first iteration done {self.reached_s:.1f} s after the start: {parts}")


startup = Startup()
"""Of this process."""


def read_startups(folder: Path) -> list[dict[str, float]]:
    """The records of a stage's folder, oldest first."""
    return read_json_lines(StageFolder(folder).startup)
