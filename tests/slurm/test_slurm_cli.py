"""What Slurm's commands print, read."""

import os
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.slurm_cli import (
    JobState,
    Unreadable,
    controller_time,
    first_node,
    job_end_time,
    job_states,
    parse_table,
    seconds_left,
    show_job,
    slurm_message,
    some_nodes_are_out,
)
from megatron_vcppo.slurm.submission import ScriptExecutor
from tests.helpers.clocks import has_compiler, python_with_clocks


def test_states_of_squeue_and_sacct() -> None:
    lines = ["17|PENDING|Dependency||N/A", "18|CANCELLED by 0|None|n[0-1]|2026-01-01T00:00:00"]
    states = parse_table(lines, ["17", "18"])
    assert states["17"].active and states["17"].reason == "Dependency"
    assert states["18"].state == "CANCELLED" and not states["18"].active and states["18"].nodes == "n[0-1]"


@pytest.mark.parametrize("line", ["", "Welcome", "17", "17||||", "17|PENDING", "17|RUNNING|a|b|c|d", "9|RUNNING|a|b|c"])
def test_a_line_of_another_form_is_no_state(line: str) -> None:
    running = {"17": JobState("17", "RUNNING", "None", "n1", "now")}
    assert parse_table([line, "17|RUNNING|None|n1|now"], ["17"]) == running
    assert parse_table([line], ["17"]) == {}


BANNER = "printf 'Usage of scratch | 80 \\303%%\\nUse job 5 with care: '"
"""Text and a byte that is no UTF-8, and a line without an end before the command's own."""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a wrapper of one of Slurm's commands on the path: a shell script after a banner."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def wrap(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{BANNER}\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return wrap


LAST = 'for format; do :; done; echo "$format"'
LISTED = f"{LAST} | sed 's/%i/17/; s/%T/PENDING/; s/%r/Priority/; s/%N//; s/%S/now/'"
RECORD = "echo 'JobId=17 JobName=a JobState=RUNNING Reason=None NodeList=n1 StartTime=now EndTime=2026-01-01T01:00:00'"


def test_what_wrappers_print_is_no_answer(commands: Callable[[str, str], None], tmp_path: Path) -> None:
    commands("squeue", LISTED)
    commands("sacct", "echo; echo '18|COMPLETED|None|n1|now'; echo 'sacct is slow today'")
    commands("scontrol", RECORD)
    commands("sinfo", "echo nothing is down")
    assert job_states(["17", "18"]) == {
        "17": JobState("17", "PENDING", "Priority", "", "now"),
        "18": JobState("18", "COMPLETED", "None", "n1", "now"),
    }
    assert show_job("17") == {
        "JobId": "17", "JobName": "a", "JobState": "RUNNING", "Reason": "None", "NodeList": "n1", "StartTime": "now",
        "EndTime": "2026-01-01T01:00:00",
    }  # fmt: skip
    assert not some_nodes_are_out()
    commands("sinfo", LAST)
    assert some_nodes_are_out()
    commands("scontrol", "echo 'Configuration data as of 1999-01-01T00:00:00'; echo; echo 'SlurmctldHost = big'")
    assert controller_time() == datetime(1999, 1, 1)


def test_answers_without_what_was_asked_are_one_error(commands: Callable[[str, str], None]) -> None:
    """And never a job that Slurm has forgotten."""
    for name in ("squeue", "sacct", "scontrol"):
        commands(name, "echo 17 is fine")
    with pytest.raises(Unreadable, match=r"^scontrol show job 17: the answer has no line .* begins with 'Usage of scr"):
        job_states(["17"])
    assert job_end_time("17") == float("inf")
    assert abs((controller_time() - datetime.now()).total_seconds()) < 60


@pytest.mark.parametrize("answer", ["Submitted batch job 17", "Submitted batch job 17 on cluster big\nhave a nice day"])
def test_the_job_that_sbatch_names_is_read_from_its_own_line(answer: str) -> None:
    read = ScriptExecutor._get_job_id_from_submission_command
    assert read(f"Use job 5 with care: {answer}") == read(f"job 5\n{answer}".encode()) == "17"
    with pytest.raises(UserError, match=r"sbatch: the answer has no line .*squeue --me"):
        read("your job 5 is queued")


def test_slurms_message_loses_its_prefixes() -> None:
    text = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition"
    )
    assert slurm_message(text) == "invalid partition specified: x; Batch job submission failed: Invalid partition"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[0-1]", "node0"),
        ("gpu[003-005,9],big1", "gpu003"),
        ("a,b[1-2]", "a"),
        ("rack[7]", "rack7"),
        ("one", "one"),
        ("", ""),
    ],
)
def test_the_first_of_slurms_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_what_a_job_has_left_needs_no_clock_but_slurms() -> None:
    """Whatever the time is here, and RunTime, which scontrol computes by this clock."""
    record = {"StartTime": "1999-01-01T00:00:00", "EndTime": "1999-01-01T01:00:00", "RunTime": "9999-00:00:00"}
    assert seconds_left(record, datetime(1999, 1, 1, 0, 10)) == 3000
    assert seconds_left(record, datetime(1999, 1, 1, 2)) == -3600
    with pytest.raises(ValueError, match="Unknown"):
        seconds_left(record | {"EndTime": "Unknown"}, datetime(1999, 1, 1))


@pytest.mark.skipif(not has_compiler(), reason="needs a C compiler")
def test_the_controllers_time_is_not_this_clocks(cluster: DevCluster, tmp_path: Path) -> None:
    code = (
        "from datetime import datetime\n"
        "from megatron_vcppo.slurm.slurm_cli import controller_time\n"
        "print((datetime.now() - controller_time()).total_seconds())\n"
    )
    python = python_with_clocks(tmp_path, {"ahead": 86400})
    for node, shift in {"ahead": 86400, "right": 0}.items():
        env = os.environ | {"SLURMD_NODENAME": node}
        done = subprocess.run([python, "-c", code], env=env, cwd=Path.cwd(), capture_output=True, text=True, timeout=60)
        assert abs(float(done.stdout) - shift) < 60, done.stderr
