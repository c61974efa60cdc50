"""Nodes that only reach each other over their own addresses: what is wrong with a network is refused or named."""

import tempfile
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.role_commands import RoleCommands
from megatron_vcppo.run import events
from megatron_vcppo.slurm import devcluster_net
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.doctor_checks import checks
from megatron_vcppo.slurm.submission import submit
from tools.benchmarks._tiny_chains import TINY, cluster_config, wait_for_jobs, write_config

own_addresses = pytest.mark.skipif(not devcluster_net.possible(), reason="network namespaces need root, and ip")


def test_a_loopback_interface_is_refused_and_nothing_is_queued(cluster: DevCluster, tmp_path: Path, capsys) -> None:
    config = cluster_config(tmp_path / "run", ("sft", "ppo"))
    config.cluster.network_interface = "lo"
    assert main(["submit", str(write_config(config).config)]) == 2
    said = "cluster.network_interface lo is a loopback: 2 trainer + 1 rollout nodes cannot reach each other over it"
    assert said in capsys.readouterr().err
    assert not cluster.command("squeue", "-h").stdout and not events.read(tmp_path / "run")


@pytest.mark.slow
@own_addresses
def test_a_role_on_loopback_is_not_reached_from_other_nodes(cluster: DevCluster, tmp_path: Path) -> None:
    """Gloo is made to listen on 127.0.0.1: the ranks do not find each other, and its own message is shown."""
    config = cluster_config(tmp_path / "run", ("sft", "export"))
    config.cluster.environment["GLOO_SOCKET_IFNAME"], config.cluster.crash_retries = "lo", 0
    run = write_config(config)
    jobs = submit(run, config, list(config.stages), TINY)
    states = wait_for_jobs(jobs.values(), 180)
    assert [states[job].state for job in jobs.values()] == ["FAILED", "CANCELLED"]
    assert "remote=[127.0.0.1]" in table(run_status(run, config))


@pytest.mark.slow
@own_addresses
def test_an_interface_that_nodes_lack_is_named_with_what_they_have(cluster: DevCluster, tmp_path: Path) -> None:
    config = cluster_config(tmp_path / "run", ("sft",))
    config.cluster.network_interface = "ib7"
    run = write_config(config)
    jobs = submit(run, config, ["sft"], TINY)
    assert wait_for_jobs(jobs.values(), 60)[jobs["sft"]].state == "FAILED"
    has = {name: f"lo 127.0.0.1, eth0 {address}" for name, address in cluster.node_addresses.items()}
    lines = [f"{name}: no IPv4 interface or address ib7; there are: {there}" for name, there in has.items()]
    assert any(line in table(run_status(run, config)) for line in lines)
    assert not run.stage("sft").attempts(), "found before the stage started"
    with pytest.raises(UserError) as error:
        dict(checks(config, RoleCommands(), tmp_path))["file system, Python, network"]()
    assert any(line in str(error.value) for line in lines)


@pytest.mark.slow
def test_without_namespaces_nodes_are_loopback_addresses_by_which_roles_bind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test cluster of an ordinary user: one loopback interface, told apart by the nodes' names."""
    monkeypatch.setattr(devcluster_net, "possible", lambda: False)
    root = Path(tempfile.mkdtemp(prefix="vcppo_slurm_"))
    cluster = DevCluster(root, tied=True)
    cluster.up(nodes=2)
    try:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        assert cluster.node_names == ["127.0.0.10", "127.0.0.11"] and cluster.network is None
        config = cluster_config(tmp_path / "run", ("sft",))
        config.cluster.rollout_nodes = 0
        run = write_config(config)
        jobs = submit(run, config, ["sft"], TINY)
        assert wait_for_jobs(jobs.values(), 180)[jobs["sft"]].state == "COMPLETED", table(run_status(run, config))
    finally:
        cluster.down()
