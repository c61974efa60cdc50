"""What Slurm's commands print, read."""

import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.slurm_cli import first_node, parse_table, seconds_left, slurm_message
from tests.helpers.clocks import has_compiler, python_with_clocks


def test_states_of_squeue_and_sacct() -> None:
    states = parse_table("17|PENDING|Dependency||N/A\n18|CANCELLED by 0|None|n[0-1]|2026-01-01T00:00:00\n")
    assert states["17"].active and states["17"].reason == "Dependency"
    assert states["18"].state == "CANCELLED" and not states["18"].active and states["18"].nodes == "n[0-1]"


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
