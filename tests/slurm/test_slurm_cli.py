"""What Slurm's commands print, read."""

import pytest

from megatron_vcppo.slurm.slurm_cli import first_node, parse_table, seconds_left, slurm_message


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


@pytest.mark.parametrize(
    ("run_time", "left_s"), [("00:10:00", 3000.0), ("2-01:00:30", 3600.0 - 2 * 86400 - 3630), ("00:00:00", 3600.0)]
)
def test_what_a_job_has_left_needs_no_clock_but_slurms(run_time: str, left_s: float) -> None:
    record = {"StartTime": "1999-01-01T00:00:00", "EndTime": "1999-01-01T01:00:00", "RunTime": run_time}
    assert seconds_left(record) == left_s, "whatever the time is here"
    with pytest.raises(ValueError, match="Unknown"):
        seconds_left(record | {"EndTime": "Unknown"})
