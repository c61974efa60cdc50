"""The one-machine Slurm itself: real commands on it, accounting, and that nothing of it is left."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.processes import free_port
from megatron_vcppo.slurm import devcluster_net
from megatron_vcppo.slurm.devcluster import DevCluster, missing_programs
from tools.benchmarks._tiny_chains import processes_with, wait_until


def test_every_virtual_node_runs_its_task(cluster: DevCluster) -> None:
    done = cluster.command(
        "srun", "-N4", "-n4", "--gpus-per-node=2", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    )
    assert sorted(done.stdout.splitlines()) == [f"{name} 0,1" for name in cluster.node_names], done.stderr


def test_a_second_cluster_in_the_same_folder_is_refused(cluster: DevCluster) -> None:
    with pytest.raises(UserError, match="a cluster is running there"):
        DevCluster(cluster.root).up()


def test_name_servers_are_those_of_other_machines(tmp_path: Path) -> None:
    resolver = tmp_path / "resolv.conf"
    assert devcluster_net.name_servers(resolver) == []
    resolver.write_text(
        "# none\nsearch a b\nnameserver\nnameserver 127.0.0.53\nnameserver 10.1.2.3\nnameserver fe80::1\n"
    )
    assert devcluster_net.name_servers(resolver) == ["10.1.2.3"]


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_programs(accounting=True)), reason="slurmdbd or MariaDB is not installed")
def test_with_accounting_and_down_without_a_trace() -> None:
    folder = Path(tempfile.mkdtemp(prefix="vcppo_slurm_"))
    folder.chmod(0o755)
    cluster = DevCluster(folder / "cluster", tied=True)
    try:
        cluster.up(nodes=1, accounting=True)
        job = cluster.command("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 3").stdout.strip()
        sacct = ("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode")
        wait_until(lambda: cluster.command(*sacct).stdout == "FAILED|3:0\n", "sacct to know the job")
    finally:
        cluster.down()
    assert not processes_with(str(folder)) and not (folder / "cluster").exists()
    folder.rmdir()


@pytest.mark.slow
def test_the_script_brings_it_up_and_down() -> None:
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}")
    root = Path(tempfile.mkdtemp(prefix="vcppo_slurm_"))
    call = [sys.executable, "-m", "megatron_vcppo.slurm.devcluster"]
    at = ["--root", str(root / "c")]
    root.chmod(0o755)
    try:
        up = subprocess.run([*call, "up", *at, "--nodes", "2"], capture_output=True, text=True, timeout=60)
        assert up.returncode == 0 and up.stdout == f"export SLURM_CONF={root / 'c' / 'slurm.conf'}\n", up.stderr
        status = subprocess.run([*call, "status", *at], capture_output=True, text=True, timeout=60)
        assert status.returncode == 0 and f"slurmd.{DevCluster(root / 'c').node_names[1]}: process" in status.stdout
    finally:
        subprocess.run([*call, "down", *at], check=True, timeout=60)
    assert not processes_with(str(root)) and not list(root.iterdir())
    root.rmdir()


LISTEN = "import socket, time; s = socket.socket(); s.bind(('{address}', {port})); s.listen(); time.sleep(20)"
REACH = "import socket; socket.create_connection(('{address}', {port}), 2)"


@pytest.mark.skipif(not devcluster_net.possible(), reason="network namespaces need root, and ip")
def test_a_listener_on_loopback_is_not_reached_from_another_node(cluster: DevCluster) -> None:
    """The one on the node's own address is: otherwise nodes would share one loopback interface, as processes do."""
    first, second = cluster.node_names[:2]
    address, port = cluster.node_addresses[first], free_port()

    def reached(at: str, node: str) -> bool:
        argv = ("srun", "--mem=50", "-N1", "-n1", "-w", node, "python3", "-c")
        return cluster.command(*argv, REACH.format(address=at, port=port)).returncode == 0

    for at, elsewhere in ((address, True), ("127.0.0.1", False)):
        job = ("sbatch", "--parsable", "--mem=50", "-w", first, "-o", "/dev/null", "--wrap")
        listener = cluster.command(*job, f'exec python3 -c "{LISTEN.format(address=at, port=port)}"').stdout.strip()
        wait_until(partial(reached, at, first), f"a listener on {at}")
        assert reached(at, second) is elsewhere
        cluster.command("scancel", "--full", listener)
        wait_until(lambda: not cluster.command("squeue", "-h").stdout, "the listener to end")
