"""RUN/events.jsonl: what happened to a run, appended only, one JSON object per line."""

import time
from pathlib import Path
from typing import Any

from megatron_vcppo.run.files import append_json_line, read_json_lines
from megatron_vcppo.run.folder import RunFolder


def append(run: Path, event: str, **fields: Any) -> None:
    """Append one event to a run's folder."""
    append_json_line(RunFolder(run).events, {"time": round(time.time(), 3), "event": event, **fields})


def read(run: Path) -> list[dict[str, Any]]:
    """All events in order."""
    return read_json_lines(RunFolder(run).events)


def of_stage(run: Path, event: str, stage: str) -> list[dict[str, Any]]:
    """The events of one kind about one stage, in order."""
    return [record for record in read(run) if (record["event"], record.get("stage")) == (event, stage)]
