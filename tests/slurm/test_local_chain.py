"""The chain on this machine with real gloo ranks: resume, skipping, crashes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch import preloaded
from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.chain_status import run_status, table
from tools.benchmarks._tiny_chains import TINY, processes_with, ranks_of, result, tiny_config, wait_until, write_config


def test_a_chain_runs_once_is_then_skipped_and_damage_is_reported(tiny_run: tuple[RunFolder, Config], capsys) -> None:
    run, config = tiny_run
    assert run_chain(run, config, ["sft"], TINY) == 0
    assert result(run)["trained"] == [1, 2, 3, 4, 5, 6] and result(run)["total"] == 21
    assert run_chain(run, config, ["sft"], TINY) == 0
    assert "[1/1] sft: done before, skipped" in capsys.readouterr().out
    assert len(run.stage("sft").attempts()) == 1
    next(run.stage("sft").checkpoint(6).rglob("weights.bin")).write_bytes(b"short")
    with pytest.raises(UserError, match=r"weights\.bin: 5 bytes, should be 1000"):
        run_chain(run, config, ["sft"], TINY)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 1", "preloaded"])
def test_a_kill_costs_at_most_the_work_since_the_checkpoint(tiny_run: tuple[RunFolder, Config], victim: str) -> None:
    run, config = tiny_run
    config.sft.steps = 12
    config.cluster.environment["TINY_SECONDS"] = "0.1"
    write_config(config)

    def kill() -> None:
        wait_until(lambda: run.stage("sft").checkpoint_iteration(), "a checkpoint")
        forked_from = [line for line in processes_with(f"-m {preloaded.__name__}") if str(run.path) in line]
        (pid,) = (
            ranks_of(run, "sft", 1)
            if victim == "rank 1"
            else [int(line.split()[0]) for line in forked_from if "guard.py" not in line]
        )
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code = run_chain(run, config, ["sft"], TINY)
    killer.join()
    assert code == 0 and result(run)["trained"] == list(range(1, 13)) and result(run)["total"] == 78
    ends = [event for event in events.read(run.path) if event["event"] == "attempt_end"]
    assert [end["code"] for end in ends] == [137, 0] and "was killed by SIGKILL" in ends[0]["cause"]
    assert victim != "rank 1" or "trainer 1" in ends[0]["cause"]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_the_stage_starts_again(
    tiny_run: tuple[RunFolder, Config], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, config = tiny_run
    config.cluster.environment |= {"TINY_HANG": str(tmp_path / "hung"), "TINY_PATIENCE_S": "6"}
    write_config(config)
    assert run_chain(run, config, ["sft"], TINY) == 0
    assert result(run)["trained"] == [1, 2, 3, 4, 5, 6]
    first, _ = events.of_stage(run.path, "attempt_end", "sft")
    assert first["cause"] == "trainer 0 left with exit code 1: waited in vain for trainer 1 (run.timeout_s)"


def test_bad_data_ends_the_chain_with_code_2(tiny_run: tuple[RunFolder, Config], capsys) -> None:
    run, config = tiny_run
    config.sft.train = "bad"
    write_config(config)
    assert run_chain(run, config, ["sft"], TINY) == 2
    text = table(run_status(run, config))
    assert "failed" in text and f"sample has no response; fix it, then vcppo resume {run.path}" in text
    assert "data.jsonl:7: sample has no response" in capsys.readouterr().out
    assert len(run.stage("sft").attempts()) == 1


@pytest.mark.slow
def test_term_saves_and_the_next_call_goes_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", steps=200)
    config.sft.checkpoint.save_every = 1000
    run = write_config(config)
    code = f"""
        import sys; sys.path.insert(0, {os.getcwd()!r})
        from omegaconf import OmegaConf
        from pathlib import Path
        from megatron_vcppo.config import Config
        from megatron_vcppo.launch.local_chain import run_chain
        from megatron_vcppo.run.folder import RunFolder
        from tools.benchmarks._tiny_chains import TINY
        run = RunFolder(Path({str(run.path)!r}))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(run.config)))
        sys.exit(run_chain(run, config, ["sft"], TINY))
    """
    chain = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    wait_until(lambda: len(run.stage("sft").recent_metrics()) > 2, "iterations")
    status = run_status(run, config)[0]
    assert (status.state, status.note) == ("running", "on this machine") and status.total == 200 and status.eta_s
    with pytest.raises(UserError, match="another vcppo run or submit is at work"):
        run_chain(run, config, ["sft"], TINY)
    chain.send_signal(signal.SIGTERM)
    out = chain.communicate(timeout=60)[0]
    assert chain.returncode == 75 and "sft: saved after" in out
    saved = run.stage("sft").checkpoint_iteration()
    assert saved and saved >= 3 and not processes_with(str(run.config))
    config.sft.steps = saved + 2
    write_config(config)
    assert run_chain(run, config, ["sft"], TINY) == 0
    assert result(run)["trained"] == list(range(1, saved + 3))


@pytest.mark.skipif(os.getuid() != 0, reason="a small file system needs root")
def test_a_disk_too_full_for_the_controller_itself_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=True)
    try:
        config = tiny_config(folder)
        run = write_config(config)
        with pytest.raises(OSError, match="No space left"):
            (folder / "filling").write_bytes(bytes(1 << 20))
        with pytest.raises(UserError, match=f"No space left on device: make room, then vcppo resume {folder}"):
            run_chain(run, config, ["sft"], TINY)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
