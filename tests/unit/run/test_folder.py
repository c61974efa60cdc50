"""Where the files of a run are, and what they say about its stages."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError, system_error
from megatron_vcppo.run.folder import RunFolder, StageFolder, iteration_name, iteration_of
from megatron_vcppo.run.manifest import write_manifest


def save(stage: StageFolder, iteration: int, complete: bool = True) -> Path:
    checkpoint = stage.checkpoint(iteration)
    (checkpoint / "actor").mkdir(parents=True)
    (checkpoint / "actor" / "weights").write_bytes(b"weights")
    if complete:
        write_manifest(checkpoint, {"iteration": iteration})
    return checkpoint


def test_the_places_of_a_run_stay_where_earlier_runs_have_them(tmp_path: Path) -> None:
    config = Config()
    config.run.dir = str(tmp_path)
    run = RunFolder.of(config)
    stage = run.stage("ppo")
    places = [run.config, run.events, run.job_log("7"), stage.checkpoint(120), stage.rollouts, stage.rendezvous]
    places += [stage.attempt(2), stage.metrics, stage.profiles, stage.startup, stage.manifest, stage.data("train")]
    places += [
        run.stage("evaluate").results,
        run.stage("evaluate").results_table,
        run.stage("export").exported("actor"),
    ]
    assert [str(path.relative_to(tmp_path)) for path in places] == [
        "config.yaml",
        "events.jsonl",
        "slurm/7_0_log.out",
        "ppo/checkpoints/iter_0000120",
        "ppo/rollouts",
        "ppo/rendezvous",
        "ppo/logs/attempt_2",
        "ppo/metrics.jsonl",
        "ppo/profiles.jsonl",
        "ppo/startup.jsonl",
        "ppo/manifest.json",
        "ppo/data/train",
        "evaluate/results.json",
        "evaluate/results.md",
        "export/hf",
    ]


@pytest.mark.parametrize("iteration", [0, 120, 12345678])
def test_names_of_iterations_are_read_back(iteration: int) -> None:
    assert iteration_of(iteration_name(iteration)) == iteration


@pytest.mark.parametrize("name", [".iter_0000003.tmp", "iter_0000003.old", "iter_3", "other"])
def test_other_names_are_no_iterations(name: str) -> None:
    assert iteration_of(name) is None


def test_a_checkpoint_counts_once_it_has_a_manifest(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).stage("sft")
    assert stage.checkpoint_iteration() is None
    save(stage, 9)
    save(stage, 10)
    save(stage, 11, complete=False)
    assert stage.checkpoint_iteration() == 10


def test_a_stage_is_done_when_its_manifest_verifies(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).stage("sft").make()
    checkpoint = save(stage, 3)
    assert not stage.is_done() and stage.last_checkpoint("actor") is None
    stage.results.write_text("[]")
    stage.mark_done(checkpoint=checkpoint, outputs=("results.json",))
    assert stage.is_done() and stage.marked_done()
    assert stage.last_checkpoint("actor") == checkpoint / "actor" and stage.last_checkpoint("critic") is None
    recorded = json.loads(stage.manifest.read_text())
    assert recorded["meta"] == {"checkpoint": "checkpoints/iter_0000003"}
    inside = [f"checkpoints/iter_0000003/{name}" for name in ("actor/weights", "manifest.json")]
    assert list(recorded["files"]) == [*inside, "results.json"]
    (checkpoint / "actor" / "weights").write_bytes(b"weighty")
    assert stage.is_done(checksums=False)
    with pytest.raises(UserError, match="checksum differs"):
        stage.is_done()


def test_attempts_are_ordered_by_number(tmp_path: Path) -> None:
    stage = RunFolder(tmp_path).stage("sft")
    assert stage.next_attempt().name == "attempt_1"
    for number in (2, 10, 9):
        stage.attempt(number).mkdir(parents=True)
    assert [path.name for path in stage.attempts()] == ["attempt_2", "attempt_9", "attempt_10"]
    assert stage.next_attempt().name == "attempt_11"


def test_one_process_at_a_time_starts_stages(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.in_use()
    with run.locked():
        assert run.in_use()
        with pytest.raises(UserError, match="another vcppo run or submit is at work in this run"), run.locked():
            pass
    assert not run.in_use()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE, errno.EIO])
def test_a_storage_that_is_full_or_fails_is_one_line(tmp_path: Path, number: int) -> None:
    """In the process that starts stages, here or in a job, and in a command."""
    run, file = RunFolder(tmp_path), tmp_path / "events.jsonl"
    failure = OSError(number, os.strerror(number), str(file))
    line = rf"^{file}: {os.strerror(number)}: .+, then"
    with pytest.raises(UserError, match=rf"{line} vcppo resume {tmp_path}$"), run.storage_errors_named():
        raise failure
    assert system_error(failure) is not None
    with pytest.raises(UserError, match=rf"{line} run the same command again$"):
        raise system_error(failure) or failure


def test_a_terminal_that_is_gone_is_no_storage(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"), RunFolder(tmp_path).storage_errors_named():
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("existed", [False, True])
def test_what_fails_leaves_no_new_run_folder(tmp_path: Path, existed: bool) -> None:
    run = RunFolder(tmp_path / "run")
    if existed:
        run.make()
    with pytest.raises(OSError, match="full"), run.removed_if_new():
        run.make()
        (run.path / "half").touch()
        raise OSError(errno.ENOSPC, "full")
    assert run.path.exists() == existed
