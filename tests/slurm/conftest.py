"""Fixtures: a run folder with a tiny stage's configuration; a real Slurm of virtual nodes."""

import getpass
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.devcluster import DevCluster, missing_programs
from tools.benchmarks._tiny_chains import processes_with, tiny_config, wait_until, write_config


@pytest.fixture
def tiny_run(tmp_path: Path) -> tuple[RunFolder, Config]:
    config = tiny_config(tmp_path / "run")
    return write_config(config), config


@pytest.fixture(scope="session")
def dev_cluster() -> Iterator[DevCluster]:
    """A real Slurm of 4 virtual nodes for the whole session, if its packages are installed."""
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}")
    cluster = DevCluster(Path(tempfile.mkdtemp(prefix="vcppo_slurm_")), tied=True)  # munge wants readable parents
    cluster.up(nodes=4)
    yield cluster
    cluster.down()
    assert not processes_with(str(cluster.root))


@pytest.fixture
def cluster(dev_cluster: DevCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[DevCluster]:
    """The cluster with its environment set, and without jobs afterwards; a new one if a test has left it broken."""
    try:
        dev_cluster.wait_idle(dev_cluster.node_names)
    except UserError as error:
        log = (dev_cluster.root / "log" / "slurmctld.log").read_text().splitlines()[-40:]
        print(f"left by the test before: {error}", dev_cluster.command("sinfo", "-N", "-l").stdout, *log, sep="\n")
        dev_cluster.down()
        dev_cluster.up(nodes=4)
    for name, value in dev_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield dev_cluster
    dev_cluster.command("scancel", "--user", getpass.getuser())
    wait_until(lambda: not dev_cluster.command("squeue", "-h").stdout.strip(), "jobs to end")
