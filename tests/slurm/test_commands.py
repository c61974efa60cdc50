"""The commands as a user types them, on a real Slurm: submit, status, logs, cancel, resume, sweep."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_vcppo.cli import main
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.slurm_cli import Unreachable, job_states, patiently
from megatron_vcppo.slurm.submission import submitted_jobs
from tools.benchmarks._tiny_chains import TINY, cluster_config, result, wait_for_jobs, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def tiny_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands start the tiny stage in place of the real ones."""
    monkeypatch.setattr("megatron_vcppo.slurm.submission.resolve_python", lambda config: TINY)


def config_file(folder: Path, stages: tuple[str, ...], steps: int = 6, seconds: float = 0.05) -> Path:
    config = cluster_config(folder / "run", stages, steps)
    config.cluster.environment["TINY_SECONDS"] = str(seconds)
    path = folder / "config.yaml"
    OmegaConf.save(OmegaConf.structured(config), path)
    return path


def vcppo(*argv: str) -> "subprocess.Popen[str]":
    """A command in a process of its own, its output read through a pipe."""
    command = [sys.executable, "-m", "megatron_vcppo.cli", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_chain_watched_cancelled_and_resumed(cluster: DevCluster, tmp_path: Path, capsys) -> None:
    file = config_file(tmp_path, ("sft", "ppo"), steps=40, seconds=0.2)
    folder = str(tmp_path / "run")
    assert main(["submit", str(file), "--dry-run"]) == 0
    assert "nothing was submitted" in capsys.readouterr().out and not cluster.command("squeue", "-h").stdout
    assert main(["status", folder]) == 0
    assert capsys.readouterr().out.count("not started") == 2
    assert main(["submit", str(file)]) == 0
    assert f"watch with: vcppo status {folder} --watch" in capsys.readouterr().out
    run, _ = open_run(tmp_path / "run")
    following = vcppo("logs", folder, "-f")
    watching = vcppo("status", folder, "--watch", "--every", "1")
    wait_until(lambda: run.stage("sft").checkpoint_iteration(), "a checkpoint", 60)
    assert main(["submit", str(file)]) == 2
    assert "this run is active, jobs" in capsys.readouterr().err
    assert main(["status", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["sft", "running"] and "/40" in lines[1]
    assert any(re.match("sft: .*loss", line) for line in lines)
    assert next(line for line in lines if line.startswith("ppo")).split()[1] == "pending"
    assert lines[-1] == "ppo: waits for the stage before"
    assert main(["logs", folder]) == 0
    assert "rank 0/2 starts after iteration 0" in capsys.readouterr().out
    assert main(["logs", folder, "ppo"]) == 2
    assert "no attempt of ppo has started" in capsys.readouterr().err

    assert main(["cancel", folder]) == 0
    assert capsys.readouterr().out == f"cancelled: {', '.join(submitted_jobs(run).values())}\n"
    wait_for_jobs(submitted_jobs(run).values(), 60)
    watched = watching.communicate(timeout=30)[0]
    shown = [line for line in watched.splitlines() if line.startswith("sft ")]
    assert watching.returncode == 0 and "running" in shown[-2] and "cancelled" in shown[-1]
    assert main(["cancel", folder]) == 0
    assert "nothing to cancel" in capsys.readouterr().out
    assert main(["status", folder]) == 0
    assert f"continue with: vcppo resume {folder}" in capsys.readouterr().out
    saved = run.stage("sft").checkpoint_iteration()

    assert main(["resume", folder, "sft.steps=50"]) == 0
    wait_for_jobs(submitted_jobs(run).values(), 120)
    assert main(["status", folder]) == 0
    assert capsys.readouterr().out.count("done") == 2
    assert [result(run, stage)["trained"] for stage in ("sft", "ppo")] == [list(range(1, 51))] * 2
    followed = following.communicate(timeout=30)[0]
    heads = [line for line in followed.splitlines() if line.startswith("==>")]
    attempts = [("sft", 1), ("sft", 2), ("ppo", 1)]
    assert heads == [f"==> {run.stage(s).logs}/attempt_{n}/trainer_0.log <==" for s, n in attempts]
    assert following.returncode == 0 and f"rank 0/2 starts after iteration {saved}" in followed
    assert main(["logs", folder, "sft", "--attempt", "1"]) == 0
    assert "after iteration 0" in capsys.readouterr().out
    assert main(["logs", folder, "ppo", "--role", "rollout"]) == 0
    assert capsys.readouterr().out.startswith("incarnation 0")
    assert main(["logs", folder, "--role", "job"]) == 0
    assert "ppo: done" in capsys.readouterr().out
    assert main(["resume", folder]) == 0
    assert capsys.readouterr().out.count("done before") == 2


def test_a_sweep_and_its_table(cluster: DevCluster, tmp_path: Path, capsys) -> None:
    file, folder = config_file(tmp_path, ("sft", "export")), tmp_path / "run"
    command = ["sweep", str(file), "sft.steps=[4, 6]", "run.seed=[0, 1]", "sft.batch_size=8"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "0: sft.steps=4 run.seed=0\n  sft " in out and f"results: vcppo sweep --results {folder}" in out
    assert main(["sweep", "--results", str(folder)]) == 0
    jobs = [job for index in range(4) for job in submitted_jobs(open_run(folder / str(index))[0]).values()]
    assert len(set(jobs)) == 8
    wait_for_jobs(jobs, 120)
    capsys.readouterr()
    assert main(["sweep", "--results", str(folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "sft.steps", "run.seed", "stage", "state", "loss"]
    assert lines[1] == ["0", "4", "0", "export", "done", "0.25"] and lines[4][:3] == ["3", "6", "1"]
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before") == 4
    assert main(["sweep", str(file), "sft.steps=[4, 8]"]) == 2
    assert "another sweep lives here" in capsys.readouterr().err


def test_an_experiment_is_queued_in_two_calls(cluster: DevCluster, tmp_path: Path, capsys) -> None:
    """Arms begin with the finished stages of the shared run, so they are queued once these are done."""
    config_file(tmp_path, ("sft", "export"))
    experiment = "title: T\nconfig: config.yaml\nshared: {stages: [sft]}\narms: {one: {}, two: {}}\n"
    (tmp_path / "mine.yaml").write_text(experiment)
    root = tmp_path / "experiments"
    command = ["experiment", str(tmp_path / "mine.yaml"), "--seeds", "1", "--dir", str(root)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("shared stages, seed 0: sft ") and "2 chains wait for their shared stages" in out
    wait_for_jobs(submitted_jobs(open_run(root / "shared" / "config" / "seed_0")[0]).values(), 120)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "one, seed 0: export " in out and "two, seed 0: export " in out and "wait" not in out
    for arm in ("one", "two"):
        run, _ = open_run(root / "mine" / arm / "seed_0")
        assert list(submitted_jobs(run)) == ["export"] and result(run)["trained"] == [1, 2, 3, 4, 5, 6]
        wait_for_jobs(submitted_jobs(run).values(), 120)
    assert main(command) == 0
    assert "mine/report.html" in capsys.readouterr().out


def test_a_silent_controller_is_not_a_failed_stage(cluster: DevCluster, tmp_path: Path, capsys) -> None:
    """While slurmctld is down, status says so and --watch keeps asking."""
    file, folder = config_file(tmp_path, ("sft",), steps=60, seconds=0.2), str(tmp_path / "run")
    assert main(["submit", str(file)]) == 0
    run, _ = open_run(tmp_path / "run")
    wait_until(
        lambda: run.stage("sft").checkpoint_iteration(), "a checkpoint", 60
    )  # by then slurmctld has saved its state
    watching = vcppo("status", folder, "--watch", "--every", "1")
    jobs = submitted_jobs(run)
    cluster.kill("slurmctld")
    capsys.readouterr()
    with ThreadPoolExecutor() as pool:
        try:
            assert main(["status", folder]) == 2
            assert "Unable to contact slurm controller" in capsys.readouterr().err
            assert main(["submit", str(file)]) == 2
            with pytest.raises(Unreachable):
                job_states(["1"])
            patient = pool.submit(patiently, lambda: job_states(list(jobs.values())))
        finally:
            cluster.start_controller()
        assert patient.result()[jobs["sft"]].active
    wait_for_jobs(jobs.values(), 90)
    watched = watching.communicate(timeout=30)[0]
    assert watching.returncode == 0 and "asking again" in watched and "failed" not in watched
    assert run.stage("sft").is_done()
