"""What a user can get wrong about a cluster: one line that says what and where, exit code 2, nothing left queued."""

import re
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import megatron_vcppo.launch.local_chain
from megatron_vcppo.cli import main
from megatron_vcppo.config import Config
from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.processes import free_port
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster, missing_programs
from megatron_vcppo.slurm.devcluster_conf import ACCOUNT
from megatron_vcppo.slurm.submission import submit
from tools.benchmarks._tiny_chains import TINY, cluster_config, result, wait_for_jobs, write_config


def refused(config: Config, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line with which ``vcppo submit`` refuses this configuration."""
    file = folder / "config.yaml"
    OmegaConf.save(OmegaConf.structured(config), file)
    assert main(["submit", str(file), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert not [event for event in events.read(Path(config.run.dir)) if event["event"] == "submitted"]
    return lines[0]


def test_no_sbatch_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = cluster_config(tmp_path / "run", ("sft",))
    message = (
        "sbatch, srun, squeue, scontrol, scancel not on the path: submit from a login node, or use --cluster local"
    )
    assert refused(config, tmp_path, capsys).endswith(message)
    assert main(["doctor", "--cluster", "devcluster", "--folder", str(tmp_path)]) == 1
    assert "FAIL  Slurm's commands: sbatch, srun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("partition", "nowhere", "invalid partition specified: nowhere"),
        ("gpus_per_node", 9, "node configuration is not available; requested 2 nodes with 9 GPUs and 2 CPUs each"),
        ("cpus_per_node", 99, "node configuration is not available|CPU count"),
        ("trainer_nodes", 7, "[Mm]ore processors requested than permitted|not available|Node count"),
        ("sbatch", {"reservation": "none-such"}, "[Rr]eservation"),
    ],
)
def test_slurms_own_message_is_shown(cluster: DevCluster, tmp_path: Path, capsys, key, value, message) -> None:
    config = cluster_config(tmp_path / "run", ("sft",))
    setattr(config.cluster, key, value)
    config.cluster.trainer_ranks = 7 if key == "trainer_nodes" else 2
    line = refused(config, tmp_path, capsys)
    assert line.startswith("vcppo: error: Slurm refuses the job: ") and re.search(message, line), line
    assert not cluster.command("squeue", "-h").stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_programs(accounting=True)), reason="slurmdbd or MariaDB is not installed")
def test_an_unknown_account_or_qos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    root = Path(tempfile.mkdtemp(prefix="vcppo_slurm_"))  # munge wants readable parents
    root.chmod(0o755)
    cluster = DevCluster(root / "cluster", tied=True)
    try:
        cluster.up(nodes=3, accounting=True)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        config = cluster_config(tmp_path / "run", ("sft",))
        config.cluster.account = "not-mine"
        assert "Invalid account" in refused(config, tmp_path, capsys)
        config.cluster.account, config.cluster.qos = ACCOUNT, "golden"
        assert "qos" in refused(config, tmp_path, capsys).lower()
        assert not cluster.command("squeue", "-h").stdout
        config.cluster.qos = None
        run = write_config(config)
        states = wait_for_jobs(submit(run, config, ["sft"], TINY).values(), 60)
        assert {state.state for state in states.values()} == {"COMPLETED"} and run.stage("sft").is_done()
    finally:
        cluster.down()
        root.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "message"),
    [
        (1, "{node}: {python}: the Python environment lacks torch, omegaconf: see cluster.setup"),
        (0, "its controller never started on {node}"),
    ],
)
def test_a_node_whose_python_lacks_the_packages(cluster: DevCluster, tmp_path: Path, index: int, message: str) -> None:
    """On another node the controller's probe finds it; on the first one the controller itself cannot start."""
    python, node = tmp_path / "python", cluster.node_names[index]
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = {node} ] && exec {sys.executable} -S "$@"\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    config = cluster_config(tmp_path / "run", ("sft", "ppo"))
    run = write_config(config)
    jobs = submit(run, config, list(config.stages), RoleCommands(TINY.trainer, TINY.rollout, str(python)))
    states = wait_for_jobs(jobs.values(), 60)
    assert [states[job].state for job in jobs.values()] == ["FAILED", "CANCELLED"]
    text = table(run_status(run, config))
    assert re.search(message.format(python=python, node=node), text), text
    assert ("No module named" in text) == (index == 0)
    assert not cluster.command("squeue", "-h").stdout


@pytest.mark.slow
def test_a_port_taken_meanwhile_costs_an_attempt_and_one_taken_for_good_is_named(
    tiny_run: tuple[RunFolder, Config], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run, config = tiny_run
    config.cluster.crash_retries = 1
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        monkeypatch.setattr(megatron_vcppo.launch.local_chain, "free_port", lambda address: taken)
        assert run_chain(run, config, ["sft"], TINY) == 1
        said = f"sft: trainer 0 left with exit code 1: port {taken} of 127.0.0.1 is taken"
        assert said in capsys.readouterr().out
        assert said.removeprefix("sft: ") in table(run_status(run, config))
        assert len(run.stage("sft").attempts()) == 2
        ports = iter([taken, free_port("127.0.0.1")])
        monkeypatch.setattr(megatron_vcppo.launch.local_chain, "free_port", lambda address: next(ports))
        assert run_chain(run, config, ["sft"], TINY) == 0
    assert result(run)["trained"] == [1, 2, 3, 4, 5, 6]
