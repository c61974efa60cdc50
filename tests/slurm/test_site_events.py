"""What a site does to jobs: holds and requeues them, drains their nodes, submits from within jobs, has no HOME, loses
slurmdbd."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster, missing_programs
from megatron_vcppo.slurm.slurm_cli import job_states
from megatron_vcppo.slurm.submission import submit, submitted_jobs
from tools.benchmarks._tiny_chains import TINY, cluster_config, result, wait_for_jobs, wait_until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ONCE = list(range(1, 31))


def chain(folder: Path) -> tuple[RunFolder, Config]:
    config = cluster_config(folder, ("sft",), steps=len(ONCE))
    config.cluster.environment["TINY_SECONDS"] = "0.2"
    return write_config(config), config


def control(cluster: DevCluster, *words: str) -> None:
    done = cluster.command("scontrol", *words)
    assert done.returncode == 0, done.stderr


def assert_done(run: RunFolder, jobs: dict[str, str]) -> None:
    states = wait_for_jobs(jobs.values(), 150)
    assert {state.state for state in states.values()} == {"COMPLETED"}, run.job_log(jobs["sft"]).read_text()
    assert result(run)["trained"] == ONCE


def test_a_held_and_a_requeued_job(cluster: DevCluster, tmp_path: Path) -> None:
    run, config = chain(tmp_path / "run")
    jobs = submit(run, config, ["sft"], TINY)
    wait_until(lambda: run.stage("sft").checkpoint_iteration(), "a checkpoint", 60)
    control(cluster, "requeuehold", jobs["sft"])
    wait_until(lambda: "scontrol release" in table(run_status(run, config)), "the hold in the status", 60)
    control(cluster, "release", jobs["sft"])
    assert_done(run, jobs)
    assert len(events.of_stage(run.path, "job", "sft")) == 2, "the same job, started twice"


def test_a_rank_that_hangs_is_named_with_its_node_and_the_stage_starts_again(
    cluster: DevCluster, tmp_path: Path
) -> None:
    run, config = chain(tmp_path / "run")
    config.cluster.environment |= {"TINY_HANG": str(tmp_path / "hung"), "TINY_PATIENCE_S": "6"}
    write_config(config)
    assert_done(run, submit(run, config, ["sft"], TINY))
    nodes = events.of_stage(run.path, "job", "sft")[0]["nodes"]
    first, _ = events.of_stage(run.path, "attempt_end", "sft")
    assert first["cause"].endswith(f"waited in vain for trainer 1 on {nodes[1]} (run.timeout_s)")


def test_drained_nodes_are_waited_for_and_named(cluster: DevCluster, tmp_path: Path) -> None:
    run, config = chain(tmp_path / "run")
    drained = ",".join(cluster.node_names[:3])
    control(cluster, "update", f"nodename={drained}", "state=drain", "reason=maintenance")
    try:
        jobs = submit(run, config, ["sft"], TINY)
        wait_until(lambda: "DRAINED" in table(run_status(run, config)), "the reason", 60)
    finally:
        control(cluster, "update", f"nodename={drained}", "state=resume")
    assert_done(run, jobs)


def test_a_chain_is_submitted_from_within_a_job_that_has_no_home(cluster: DevCluster, tmp_path: Path) -> None:
    run, config = chain(tmp_path / "run")
    config.cluster.setup += ["export HOME=/nonexistent"]
    write_config(config)
    code = (
        "import sys; from pathlib import Path\n"
        "from megatron_vcppo.run.config_file import open_run\n"
        "from megatron_vcppo.slurm.submission import submit\n"
        "from tools.benchmarks._tiny_chains import TINY\n"
        "submit(*open_run(Path(sys.argv[1])), ['sft'], TINY)\n"
    )
    (tmp_path / "submit.py").write_text(code)
    outer = f"cd {Path.cwd()}; PYTHONPATH={Path.cwd()} {sys.executable} {tmp_path}/submit.py {run.path}"
    argv = ("sbatch", "-N1", "-n1", "-t1", "--wait", "-o", str(tmp_path / "outer.log"), "--wrap", outer)
    env = os.environ | cluster.environment | {"HOME": "/nonexistent"}
    subprocess.run(argv, env=env, check=True, timeout=90)
    jobs = submitted_jobs(run)
    assert jobs, (tmp_path / "outer.log").read_text()
    assert_done(run, jobs)


@pytest.fixture
def accounting(monkeypatch: pytest.MonkeyPatch) -> Iterator[DevCluster]:
    if missing := missing_programs(accounting=True):
        pytest.skip(f"not installed: {', '.join(missing)}")
    cluster = DevCluster(Path(tempfile.mkdtemp(prefix="vcppo_slurm_")), tied=True)
    try:
        cluster.up(nodes=3, accounting=True)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield cluster
    finally:
        cluster.down()


def test_a_chain_runs_while_slurmdbd_is_down(accounting: DevCluster, tmp_path: Path) -> None:
    accounting.kill("slurmdbd")
    run, config = chain(tmp_path / "run")
    jobs = submit(run, config, ["sft"], TINY)
    assert "pending" in (shown := table(run_status(run, config))) or "running" in shown
    assert_done(run, jobs)
    assert [status.state for status in run_status(run, config)] == ["done"]
    assert job_states(["4000000"]) == {}, "a job that only slurmdbd could know"
    accounting.start_slurmdbd()
    asked = ("sacct", "-X", "-n", "-P", "-j", jobs["sft"], "-o", "State")
    wait_until(lambda: accounting.command(*asked).stdout == "COMPLETED\n", "slurmdbd to learn of the job", 90)
