"""Runs that are not as the stages leave them: someone else's, with links, pipes, or lines that no stage wrote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.manifest import write_manifest
from tests.helpers.recorded_run import record_run

LOOKS = ("list", "status", "clean", "logs", "cancel", "rollouts", "report")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    config = record_run(folder, collapsing=False, iterations=2, num_rollouts=2)
    text = (folder / "config.yaml").read_text()
    assert config.prompts.test is None
    (folder / "config.yaml").write_text(text.replace("  test: null", "  test: held_out.jsonl", 1))
    (folder / "events.jsonl").write_text(json.dumps({"time": 1.7e9, "event": "attempt", "stage": "ppo"}) + "\n")
    return folder


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> RunFolder:
    folder = tmp_path / "runs" / "run"
    shutil.copytree(recorded, folder)
    return RunFolder(folder)


def looked_at(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What every command says that looks at a run; each leaves in a defined way, in one line if it refuses."""
    said = {}
    for command in LOOKS:
        capsys.readouterr()
        code = main([command, str(run.path.parent if command == "list" else run.path)])
        output = capsys.readouterr()
        assert code in (0, 1, 2) and len(output.err.splitlines()) == (code == 2), (command, code, output.err)
        said[command] = output.out + output.err
    return said


ODD_LINES = [
    '{"time": NaN, "event": "attempt", "stage": "ppo"}',
    '{"time": 1e300, "event": "save_requested", "stage": "ppo", "seconds": 3}',
    '{"time": 1' + "0" * 400 + ', "event": "attempt", "stage": "ppo"}',
    '{"time": 1.7e9, "event": "job", "stage": "ppo", "gpus": 1' + "0" * 400 + "}",
    '{"time": 1.7e9, "event": "submitted", "stage": "ppo", "job": "1\\u0000"}',
    '{"time": 1.7e9, "event": "submitted", "stage": "ppo", "job": "--help"}',
    '{"time": 1.7e9, "event": "submitted", "stage": "ppo", "job": "' + "1" * 200_000 + '"}',
]


def test_lines_that_no_stage_wrote(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.events.write_text("\n".join([*ODD_LINES, ""]))
    said = looked_at(run, capsys)
    assert "ppo" in said["status"] and "nothing to cancel" in said["cancel"]


PIPES = {
    "config.yaml": ("status", "not a run folder"),
    "events.jsonl": ("status", "not started"),
    ".lock": ("status", "ppo"),
    "ppo/metrics.jsonl": ("status", "ppo"),
    "ppo/profiles.jsonl": ("report", "report.html"),
    "ppo/manifest.json": ("list", "damaged"),
    "evaluate/manifest.json": ("status", "damaged"),
    "evaluate/results.json": ("report", "results.json: a pipe or a device"),
    "ppo/rollouts/iter_0000016_0of1.npz": ("rollouts", "0of1.npz: damaged: "),
    "ppo/rollouts/iter_0000016_0of1.jsonl.zst": ("rollouts", "0of1.jsonl.zst: damaged: "),
    "ppo/logs/attempt_9/trainer_0.log": ("logs", "trainer_0.log: a pipe or a device"),
}
"""Name in a run → a command that reads it, and what it says."""


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_not_waited_for(name: str, run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = run.path / name
    pipe.parent.mkdir(parents=True, exist_ok=True)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    said = looked_at(run, capsys)
    command, words = PIPES[name]
    assert words in said[command], said[command]


def test_nothing_is_written_or_removed_through_links(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in (".lock", "events.jsonl"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(mine)
    other = tmp_path / "other"
    for number in (1, 2):
        (other / f"iter_000000{number}").mkdir(parents=True)
        write_manifest(other / f"iter_000000{number}", {})
    for stage in ("sft", "ppo"):
        run.stage(stage).checkpoints.mkdir()
    (run.stage("sft").checkpoints / "iter_0000001").symlink_to(other / "iter_0000001")
    run.stage("ppo").checkpoints.rmdir()
    run.stage("ppo").checkpoints.symlink_to(other)
    looked_at(run, capsys)
    assert main(["clean", str(run.path), "--yes"]) == 2 and "is not followed there" in capsys.readouterr().err
    (run.path / ".lock").unlink()
    (run.path / "events.jsonl").unlink()
    assert main(["clean", str(run.path), "--yes"]) == 0 and "nothing to remove" in capsys.readouterr().out
    assert mine.read_text() == "mine" and len(list(other.glob("*/manifest.json"))) == 2


def test_clean_leaves_what_is_not_named_as_a_checkpoint(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run.stage("sft").checkpoints
    for name in ("iter_0000001", "iter_0000002", ".iter_0000003.tmp", ".iter_0000002.replaced", "notes", "iter_7.txt"):
        (checkpoints / name).mkdir(parents=True)
    for number in (1, 2):
        write_manifest(checkpoints / f"iter_000000{number}", {})
    assert main(["clean", str(run.path), "--yes"]) == 0
    assert "freed" in capsys.readouterr().out
    assert {path.name for path in checkpoints.iterdir()} == {"iter_0000002", "notes", "iter_7.txt"}


def without_rights(*argv: str) -> "subprocess.CompletedProcess[str]":
    """A command of a user who may not read or write what the mode of a file does not allow."""
    drop = "--bounding-set=-dac_override,-dac_read_search,-fowner"
    prefix = ["setpriv", drop] if os.getuid() == 0 else []
    command = [*prefix, sys.executable, "-m", "megatron_vcppo.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_run_of_another_user(run: RunFolder) -> None:
    """One that is open to be read is shown; a private one hides no other."""
    private = run.path.with_name("private")
    shutil.copytree(run.path, private)
    for path in (*run.path.rglob("*"), run.path):
        path.chmod(path.stat().st_mode & 0o555)
    private.chmod(0)
    try:
        shown = without_rights("status", str(run.path))
        assert shown.returncode == 1 and "ended without a word" in shown.stdout, shown.stderr
        listed = without_rights("list", str(run.path.parent), "--json")
        assert [record["state"] for record in json.loads(listed.stdout)] == ["failed"], listed.stderr
        refused = without_rights("clean", str(run.path))
        assert refused.returncode == 2 and refused.stderr.endswith(".lock: Permission denied: check its permissions\n")
        run.events.chmod(0)
        listed = without_rights("list", str(run.path.parent), "--json")
        assert [record["state"] for record in json.loads(listed.stdout)] == ["unreadable"], listed.stderr
    finally:
        private.chmod(0o700)
        for path in (run.path, *run.path.rglob("*")):
            path.chmod(path.stat().st_mode | 0o700)


def test_a_run_that_todays_rules_refuse_can_be_looked_at_and_ended(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one of an older version, in whose configuration a secret stands: only its stages do not start."""
    text = run.config.read_text()
    assert "  environment: {}\n" in text
    run.config.write_text(text.replace("  environment: {}\n", "  environment:\n    HF_TOKEN: hf_x\n", 1))
    said = looked_at(run, capsys)
    assert not [command for command, output in said.items() if "HF_TOKEN" in output], said
    assert main(["resume", str(run.path)]) == 2
    assert "HF_TOKEN looks like a secret" in capsys.readouterr().err
