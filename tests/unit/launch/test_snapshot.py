"""The code that a run's jobs use."""

from pathlib import Path

from megatron_vcppo.launch.snapshot import take_snapshot
from megatron_vcppo.run.folder import RunFolder


def test_a_snapshot_is_the_code_and_is_taken_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = take_snapshot(run)
    assert (first / "megatron_vcppo" / "slurm" / "job.py").read_text() == (Path("slurm") / "job.py").read_text()
    assert (first / "megatron_vcppo" / "records.py").exists() and take_snapshot(run) == first
