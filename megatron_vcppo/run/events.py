"""RUN/events.jsonl: what happened to a run, appended only, one JSON object per line."""

import json
import os
import time
from pathlib import Path
from typing import Any

EVENTS_NAME = "events.jsonl"


def append(run: Path, event: str, **fields: Any) -> None:
    """Append one event; a single write, so that lines of several writers do not mix."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
    descriptor = os.open(run / EVENTS_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(run: Path) -> list[dict[str, Any]]:
    """All events in order; a torn last line (a crash in mid-write) is left out."""
    try:
        lines = (run / EVENTS_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def of_stage(run: Path, event: str, stage: str) -> list[dict[str, Any]]:
    """The events of one kind about one stage, in order."""
    return [record for record in read(run) if (record["event"], record.get("stage")) == (event, stage)]
