"""What Slurm refuses at the last moment, after its own test of the scripts, leaves the run as it was."""

from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.run import events
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.slurm.submission import submit, submitted_jobs
from tools.benchmarks._tiny_chains import TINY, cluster_config, write_config

COMMANDS = {
    "sbatch": """case "$*" in
        *--test-only*) exit 0 ;;
        *ppo*) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1 ;;
    esac
    for script; do :; done
    if grep -q "job-name=.*ppo" "$script"; then
        echo "sbatch: error: Batch job submission failed: QOSMaxSubmitJobPerUserLimit" >&2
        exit 1
    fi
    echo "Submitted batch job 17" """,
    "scancel": """echo "$*" >> "$(dirname "$0")/cancelled" """,
    **dict.fromkeys(("srun", "squeue", "scontrol", "sacct"), ":"),
}


@pytest.fixture
def slurm_that_refuses_the_second_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, lines in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_a_refused_submission_is_undone(slurm_that_refuses_the_second_job: Path, tmp_path: Path) -> None:
    config = cluster_config(tmp_path / "run", ("sft", "ppo"), steps=6)
    run = write_config(config)
    before = run.config.read_bytes()
    config.sft.steps = 7
    with pytest.raises(UserError, match=r"Slurm refuses the job of ppo: .*QOSMaxSubmitJobPerUserLimit"):
        submit(run, config, ["sft", "ppo"], TINY)
    assert run.config.read_bytes() == before and open_run(run.path)[1].sft.steps == 6
    assert (slurm_that_refuses_the_second_job / "cancelled").read_text() == "17\n", "the first job does not stay"
    assert [event["event"] for event in events.read(run.path)] == ["config_changed", "submitted", "config_undone"]
    assert submitted_jobs(run) == {"sft": "17"}
    assert submit(run, config, ["sft"], TINY) == {"sft": "17"} and open_run(run.path)[1].sft.steps == 7
