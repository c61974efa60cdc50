"""A run folder that is renamed or removed: while its stage runs, and before a resume."""

import signal
import threading
from pathlib import Path

import pytest

from megatron_vcppo.errors import USER_ERROR, UserError
from megatron_vcppo.launch import attempts
from megatron_vcppo.launch.controller import RoleProcess
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.job import StageJob
from tools.benchmarks._tiny_chains import TINY, processes_with, tiny_config, wait_until, write_config


def test_a_stage_ends_when_its_folder_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "GONE_CHECK_S", 0.1)
    config = tiny_config(tmp_path / "run")
    run = write_config(config)
    rank = RoleProcess("trainer", 0, ("sleep", "3600.71"), {}, "trainer_0.log", end_signal=signal.SIGKILL)

    def rename() -> None:
        wait_until(lambda: processes_with("sleep 3600.71"), "the rank")
        run.path.rename(tmp_path / "new")

    thread = threading.Thread(target=rename)
    thread.start()
    with pytest.raises(UserError, match=f"{run.path}: renamed or removed while it ran: vcppo resume NEW-NAME"):
        attempts.run_stage(run, config, "sft", lambda _: [rank], save_requested=lambda: False)
    thread.join()
    assert not processes_with("sleep 3600.71") and not run.path.exists(), "nothing goes to the old name"
    moved, config = open_run(tmp_path / "new")
    assert RunFolder.of(config).path == moved.path == tmp_path / "new", "a resume works in the folder that it is given"


def test_a_job_whose_folder_was_renamed_in_the_queue_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    before = [(number, signal.getsignal(number)) for number in (signal.SIGUSR2, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as ended:
            StageJob(tmp_path / "gone", "sft", TINY)()
    finally:  # a job is a process of its own
        for number, handler in before:
            signal.signal(number, handler)
    assert ended.value.code == USER_ERROR
    assert f"{tmp_path / 'gone'}: not a run folder" in capsys.readouterr().out


def test_a_run_that_a_link_leads_to_keeps_its_name(tmp_path: Path) -> None:
    run = write_config(tiny_config(tmp_path / "run"))
    (tmp_path / "link").symlink_to(run.path)
    assert open_run(tmp_path / "link")[1].run.dir == str(run.path)
