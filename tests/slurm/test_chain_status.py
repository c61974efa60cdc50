"""What vcppo status says about a stage."""

import re
from pathlib import Path

from megatron_vcppo.slurm.chain_status import leaving_note, pending_note
from megatron_vcppo.slurm.slurm_cli import JobState


def test_the_status_says_how_long_a_save_is_given(tmp_path: Path) -> None:
    asked = {"event": "save_requested", "stage": "ppo", "time": 0.0, "seconds": 340}
    attempt, end = {"event": "attempt", "stage": "ppo"}, {"event": "attempt_end", "stage": "ppo"}
    assert re.fullmatch(r"asked at \d\d:\d\d:\d\d to save and leave within 340 s", leaving_note([attempt, asked]))
    assert leaving_note([attempt]) == leaving_note([attempt, asked, end]) == leaving_note([]) == ""


def test_why_a_job_waits() -> None:
    assert pending_note(JobState("7", "PENDING", "Dependency")) == "waits for the stage before"
    assert pending_note(JobState("7", "PENDING", "Resources", start="12:00")) == "waits for free nodes, expected 12:00"
    held = pending_note(JobState("7", "PENDING", "launch failed requeued held", start="N/A"))
    assert held == "launch failed requeued held: once its cause is fixed, scontrol release 7"
