"""Which endings a user hears of, and what their command gets."""

import signal
from pathlib import Path

import pytest

from megatron_vcppo.errors import DONE, FAILED, SAVED, USER_ERROR
from megatron_vcppo.launch import notify
from megatron_vcppo.launch.notify import announce, ending
from megatron_vcppo.run import events
from tools.benchmarks._tiny_chains import tiny_config, write_config


def test_what_is_an_ending(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", ("sft", "export"))
    run = write_config(config)
    assert ending(run, config, "sft", SAVED) is None, "it saved on request"
    run.stage("sft").make().mark_done()
    assert ending(run, config, "sft", DONE) is None, "the export is still to come"
    run.stage("export").make().mark_done()
    assert ending(run, config, "export", DONE) == ("done", "every stage of the chain is done")
    events.append(run.path, "attempt_end", stage="sft", code=1, cause="trainer 0 left with\n exit code 1")
    events.append(run.path, "refused", stage="export", cause="no such partition")
    assert ending(run, config, "sft", FAILED) == ("failed", "trainer 0 left with exit code 1")
    assert ending(run, config, "export", USER_ERROR) == ("failed", "no such partition")
    assert ending(run, config, "sft", 128 + signal.SIGINT) is None
    events.append(run.path, "gave_up", stage="sft", job="7")
    assert ending(run, config, "sft", SAVED) == (
        "stuck",
        "its starts left no new checkpoint, optimizer step or response",
    )


def test_a_cause_is_text_and_no_command(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    run = write_config(config)
    config.run.notify = f'printf "%s" "$VCPPO_CAUSE" > {tmp_path}/mail'
    events.append(run.path, "attempt_end", stage="sft", code=1, cause="$(touch x); `id` \"'")
    announce(run, config, "sft", FAILED)
    assert (tmp_path / "mail").read_text() == "$(touch x); `id` \"'"


def test_a_command_that_fails_or_hangs_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    run = write_config(config)
    config.run.notify = "echo no such host; exit 3"
    announce(run, config, "sft", FAILED)
    assert "warning: run.notify: exit code 3: no such host" in capfd.readouterr().out
    monkeypatch.setattr(notify, "COMMAND_TIMEOUT_S", 0.2)
    config.run.notify = "sleep 600 & sleep 600"
    announce(run, config, "sft", FAILED)
    assert "warning: run.notify: did not end in 0 s" in capfd.readouterr().out


def test_a_command_may_print_without_end_close_its_output_and_leave_something_running(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run")
    run = write_config(config)
    events.append(run.path, "attempt_end", stage="sft", code=1, cause="a\0b" + "x" * 200_000)
    config.run.notify = f'sleep 0.5 & echo "$VCPPO_CAUSE" > {tmp_path}/mail; exec >&- 2>&-; sleep 0.2; exit 4'
    announce(run, config, "sft", FAILED)
    assert "warning: run.notify: exit code 4\n" in capfd.readouterr().out
    assert (tmp_path / "mail").read_text().startswith("a\\x00bxxx")
    monkeypatch.setattr(notify, "COMMAND_TIMEOUT_S", 0.5)
    config.run.notify = "yes"
    announce(run, config, "sft", FAILED)
    assert "warning: run.notify: did not end in 0 s" in capfd.readouterr().out
