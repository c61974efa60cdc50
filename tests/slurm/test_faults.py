"""No fault costs more than minutes: a real Slurm, real gloo ranks, a tiny stage with the contract of every stage."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from slurm import events
from slurm.devcluster import DevCluster
from tests.slurm.faults import FAULTS, chain, full_disk, suffer
from tests.slurm.support import write_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", FAULTS)
def test_the_chain_survives(cluster: DevCluster, tmp_path: Path, fault: str) -> None:
    run, config = chain(tmp_path / "run")
    cost = suffer(cluster, run, config, FAULTS[fault], 180)
    print(f"{fault}: {cost}")
    assert cost["iterations_repeated"] <= 2 * config.sft.checkpoint.save_every


def test_the_time_limit_of_each_stage_only_requeues_it(cluster: DevCluster, tmp_path: Path) -> None:
    run, config = chain(tmp_path / "run", steps=90)
    config.cluster.environment["TINY_SECONDS"] = "0.4"
    config.cluster.time_limit_minutes, config.cluster.save_margin_s = 1, 30
    write_config(config)
    cost = suffer(cluster, run, config, None, 300)
    print(f"time limit in each stage: {cost}")
    requeued = [event["stage"] for event in events.read(run.path) if event["event"] == "requeue"]
    assert set(requeued) == {"sft", "ppo"} and cost["iterations_repeated"] == 0


@pytest.mark.skipif(os.getuid() != 0, reason="a small file system needs root")
def test_a_full_disk_is_named_and_resumed(cluster: DevCluster, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "none", str(folder)], check=True)
    try:
        run, config = chain(folder, stages=("sft",))
        config.cluster.environment["TINY_BYTES"] = "1000000"
        write_config(config)
        print(f"disk full at a checkpoint: {suffer(cluster, run, config, full_disk, 120)}")
    finally:
        for _ in range(20):
            if subprocess.run(["umount", str(folder)]).returncode == 0:
                break
            time.sleep(0.5)
