"""No fault costs more than minutes: a real Slurm, real gloo ranks, a tiny stage with the contract of every stage."""

import os
from pathlib import Path

import pytest

from megatron_vcppo.run import events
from megatron_vcppo.slurm.devcluster import DevCluster
from tools.benchmarks._faults import FAULTS, LONG, suffer

SHORT = [name for name, fault in FAULTS.items() if fault.stages != LONG.stages]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
"""Longer than the waits of any one test, whose own deadlines say what was waited for."""


@pytest.mark.parametrize("name", SHORT)
def test_the_chain_survives(cluster: DevCluster, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    if fault.needs_root and os.getuid() != 0:
        pytest.skip("a small file system needs root")
    with fault.chain(tmp_path / "run") as (run, config):
        cost = suffer(cluster, run, config, fault)
        print(f"{name}: {cost}")
        assert cost["iterations_repeated"] <= 2 * config.sft.checkpoint.save_every


@pytest.mark.timeout(1000)
def test_the_time_limit_of_each_stage_only_requeues_it(cluster: DevCluster, tmp_path: Path) -> None:
    name = "time limit in each of six stages"
    with FAULTS[name].chain(tmp_path / "run") as (run, config):
        cost = suffer(cluster, run, config, FAULTS[name])
        print(f"{name}: {cost}")
        requeued = [event["stage"] for event in events.read(run.path) if event["event"] == "requeue"]
        assert set(requeued) == set(config.stages) and cost["iterations_repeated"] == 0
