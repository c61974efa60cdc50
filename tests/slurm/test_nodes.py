"""Nodes that are not as they should be, and the doctor that finds out beforehand; on a real Slurm."""

import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.doctor_checks import checks, examine
from megatron_vcppo.slurm.submission import submit
from tools.benchmarks._tiny_chains import TINY, cluster_config, wait_for_jobs, write_config

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="hiding a folder from a node needs root")


@pytest.fixture
def half_blind(cluster: DevCluster, tmp_path: Path):
    """The cluster, its second node without sight of tmp_path/hidden."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    node = cluster.node_names[1]
    cluster.kill(f"slurmd.{node}", signal.SIGTERM)
    cluster.start_node(node, hidden=hidden)
    cluster.wait_idle([node])
    yield hidden
    cluster.kill(f"slurmd.{node}", signal.SIGTERM)
    cluster.start_node(node)
    cluster.wait_idle([node])


@pytest.mark.slow
@needs_root
def test_a_run_folder_that_is_not_shared(cluster: DevCluster, half_blind: Path) -> None:
    run = write_config(cluster_config(half_blind / "run", ("sft", "export")))
    config = cluster_config(half_blind / "run", ("sft", "export"))
    jobs = submit(run, config, list(config.stages), TINY)
    states = wait_for_jobs(jobs.values(), 60)
    assert states[jobs["sft"]].state == "FAILED" and states[jobs["export"]].state == "CANCELLED"
    message = f"{cluster.node_names[1]}: does not see {run.config}: run.dir must be on a shared file system"
    assert message in table(run_status(run, config))
    assert not cluster.command("squeue", "-h").stdout


@pytest.mark.slow
@needs_root
def test_a_node_without_the_python_environment(cluster: DevCluster, half_blind: Path, tmp_path: Path) -> None:
    python = half_blind / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    config = cluster_config(tmp_path / "run", ("sft",))
    run = write_config(config)
    jobs = submit(run, config, ["sft"], RoleCommands(TINY.trainer, TINY.rollout, str(python)))
    wait_for_jobs(jobs.values(), 60)
    assert f"{cluster.node_names[1]}: has no interpreter {python}: see cluster.python" in table(run_status(run, config))


@pytest.mark.slow
def test_the_doctor_finds_a_good_cluster_good(cluster: DevCluster, tmp_path: Path, capsys) -> None:
    config = cluster_config(tmp_path / "run", ("sft",))
    assert examine(config, RoleCommands(), tmp_path), capsys.readouterr().out
    out = capsys.readouterr().out
    assert (
        "ok    collective: gloo over 3 nodes on " in out
        and "ok    engine: one of a tiny model answers" in out
        and "FAIL" not in out
    )
    isolation = next(line for line in out.splitlines() if line.startswith("ok    isolation of programs"))
    assert sum(isolation.count(f": {name}") for name in ("bubblewrap", "namespaces", "landlock")) == 3
    assert not list(tmp_path.glob(".vcppo_doctor*"))


@pytest.mark.slow
@needs_root
def test_the_doctor_finds_the_blind_node(cluster: DevCluster, half_blind: Path) -> None:
    config = cluster_config(half_blind / "run", ("sft",))
    config.cluster.partition = "nowhere"
    assert (
        failure_of("partition", config, half_blind)
        == "no partition nowhere; there are: high, main: set cluster.partition"
    )
    config.cluster.partition = None
    assert failure_of("file system, Python, network", config, half_blind).startswith(
        f"{cluster.node_names[1]}: does not see {half_blind}"
    )


def failure_of(name: str, config: Config, folder: Path) -> str:
    """What one of the doctor's checks complains about."""
    with pytest.raises(UserError) as error:
        dict(checks(config, RoleCommands(), folder))[name]()
    return str(error.value)
