"""What vcppo status says about a stage."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.chain_status import chain_status, leaving_note, pending_note
from megatron_vcppo.slurm.slurm_cli import JobState


def test_the_status_says_how_long_a_save_is_given(tmp_path: Path) -> None:
    asked = {"event": "save_requested", "stage": "ppo", "time": 0.0, "seconds": 340}
    attempt, end = {"event": "attempt", "stage": "ppo"}, {"event": "attempt_end", "stage": "ppo"}
    assert re.fullmatch(r"asked at \d\d:\d\d:\d\d to save and leave within 340 s", leaving_note([attempt, asked]))
    assert leaving_note([attempt]) == leaving_note([attempt, asked, end]) == leaving_note([]) == ""


def test_why_a_job_waits() -> None:
    assert pending_note(JobState("7", "PENDING", "Dependency")) == "waits for the stage before"
    waiting = JobState("7", "PENDING", "Resources", start="2026-11-27T12:00:00")
    assert pending_note(waiting) == "waits for free nodes, expected 2026-11-27T12:00:00"
    held = pending_note(JobState("7", "PENDING", "launch failed requeued held", start="N/A"))
    assert held == "launch failed requeued held: once its cause is fixed, scontrol release 7"


@pytest.mark.parametrize(
    ("state", "start", "expected"),
    [
        ("PENDING", "2026-11-27T12:00:00", "2026-11-27T12:00:00"),
        ("PENDING", "N/A", None),
        ("PENDING", "", None),
        ("RUNNING", "2026-11-27T12:00:00", None),
    ],
)
def test_the_expected_start_is_a_field_of_its_own(
    tiny_run: tuple[RunFolder, Config], state: str, start: str, expected: str | None
) -> None:
    run, config = tiny_run
    stage = config.stages[0]
    events.append(run.path, "submitted", stage=stage, job="7")
    status, *others = chain_status(run, config, {"7": JobState("7", state, "Resources", start=start)})
    assert json.loads(json.dumps(asdict(status)))["expected_start"] == expected
    assert {other.expected_start for other in others} <= {None}
