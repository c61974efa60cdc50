"""vcppo list, clean and status --json, on a chain of tiny stages that ran on this machine."""

import json
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.config import Config
from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.run import events
from megatron_vcppo.run.cleaning import removable
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.usage import gpu_hours, size_bytes
from megatron_vcppo.slurm.chain_status import StageStatus, table
from tools.benchmarks._tiny_chains import TINY, tiny_config, write_config


@pytest.fixture
def ended(tmp_path: Path) -> tuple[RunFolder, Config]:
    """A run of one stage that is done, and has rollouts."""
    config = tiny_config(tmp_path / "runs" / "first", ranks=1)
    config.sft.checkpoint.keep_last = 3
    config.run.notify = f'echo "$VCPPO_EVENT of $VCPPO_RUN: $VCPPO_STAGE" >> {tmp_path}/mail'
    run = write_config(config)
    assert run_chain(run, config, ["sft"], TINY) == 0
    folder = run.stage("sft")
    folder.mark_done(checkpoint=folder.checkpoint(folder.checkpoint_iteration() or 0))  # as TrainLoop does
    folder.rollouts.mkdir()
    (run.stage("sft").rollouts / "some").write_bytes(bytes(1000))
    return run, config


def test_list_clean_and_status_of_a_run(ended: tuple[RunFolder, Config], capsys: pytest.CaptureFixture[str]) -> None:
    run, config = ended
    runs = str(run.path.parent)
    assert (run.path.parents[1] / "mail").read_text() == f"done of {run.path}: sft\n"
    (run.path.parent / "a" / "b").mkdir(parents=True)
    capsys.readouterr()

    assert main(["list", runs, "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["run"], record["stage"], record["state"]) == (str(run.path), "sft", "done")
    assert record["size_bytes"] == size_bytes(run.path) > 1000 and record["begun"] <= record["last_event"]
    assert main(["list", runs]) == 0
    assert "first" in (shown := capsys.readouterr().out) and "done" in shown and "ago" in shown

    assert main(["status", str(run.path), "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert (stage["state"], stage["attempts"], stage["gpu_hours"]) == ("done", 1, 0.0)

    checkpoints = {path.name for path in run.stage("sft").checkpoints.iterdir()}
    last = run.stage("sft").manifest_checkpoint()
    assert last and len(checkpoints) > 1
    assert main(["clean", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "nothing was removed: --yes removes it" in shown and shown.count("old checkpoint") == len(checkpoints) - 1
    assert {path.name for path in run.stage("sft").checkpoints.iterdir()} == checkpoints
    with run.locked():
        assert main(["clean", str(run.path), "--yes"]) == 2
    assert "another vcppo run or submit is at work" in capsys.readouterr().err
    assert {path.name for path in run.stage("sft").checkpoints.iterdir()} == checkpoints
    assert main(["clean", str(run.path), "--keep-rollouts", "--yes"]) == 0
    assert list(run.stage("sft").checkpoints.iterdir()) == [last] and run.stage("sft").rollouts.exists()
    assert main(["clean", str(run.path), "--yes"]) == 0
    assert not run.stage("sft").rollouts.exists() and run.stage("sft").is_done()
    capsys.readouterr()
    assert main(["clean", str(run.path)]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert run_chain(run, config, ["sft"], TINY) == 0


def test_a_run_of_ended_jobs_can_be_looked_at_without_slurm(
    ended: tuple[RunFolder, Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = ended
    events.append(run.path, "submitted", stage="sft", job="7")
    monkeypatch.setenv("PATH", "")
    capsys.readouterr()
    assert main(["status", str(run.path), "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert (stage["state"], stage["job"]) == ("done", "7")
    assert main(["clean", str(run.path)]) == 0
    run.stage("sft").manifest.unlink()
    capsys.readouterr()
    assert main(["status", str(run.path)]) == main(["clean", str(run.path)]) == 2
    assert "squeue is not on the path: run this where Slurm's commands are" in capsys.readouterr().err


def test_a_stage_that_is_not_done_keeps_its_newest_complete_checkpoint_and_all_rollouts(tmp_path: Path) -> None:
    run = write_config(tiny_config(tmp_path / "run"))
    folder = run.stage("sft")
    for number, complete in ((1, True), (2, True), (3, False)):
        folder.checkpoint(number).mkdir(parents=True)
        if complete:
            (folder.checkpoint(number) / "manifest.json").touch()
    folder.rollouts.mkdir()
    assert [item.path for item in removable(run, ["sft"])] == [folder.checkpoint(1), folder.checkpoint(3)]
    assert [item.path for item in removable(run, ["sft"], "iter_1")] == [folder.checkpoint(3)], "the export wants it"


def test_a_list_survives_a_run_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_config(tiny_config(tmp_path / "run"))
    run.events.touch()
    run.config.write_text("stages: [")
    assert main(["list", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "unreadable"
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to("/etc")
    assert size_bytes(tmp_path) == 10


def test_gpu_hours_are_those_of_jobs_and_of_attempts_here() -> None:
    here = [{"event": "attempt", "time": 0}, {"event": "attempt_end", "time": 1800}]
    assert gpu_hours(here, 2, None) == 1.0
    job = [{"event": "submitted", "time": 0}, {"event": "job", "time": 3600, "gpus": 16}]
    job += [
        {"event": "attempt", "time": 3700},
        {"event": "attempt_end", "time": 5400},
        {"event": "requeue", "time": 7200},
    ]
    assert gpu_hours(job, 8, None) == 16.0, "what the job's event says, from its start to its last event"
    job += [{"event": "job", "time": 10800}]
    assert gpu_hours(job, 8, 14400) == 16.0 + 8.0, "it still runs; older events do not name GPUs"
    assert gpu_hours([], 8, None) == 0.0
    statuses = [StageStatus("sft", "done", gpu_hours=1.5), StageStatus("ppo", "running", gpu_hours=2.25)]
    assert "GPU-hours used: 3.75" in table(statuses) and "GPU-hours" not in table([StageStatus("sft", "done")])
