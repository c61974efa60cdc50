"""Real out-of-memory kills: by the kernel, in the memory group that Slurm made for a job."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.run import events
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster, memory_limits_possible, missing_programs
from megatron_vcppo.slurm.devcluster_conf import memory_cgroup
from megatron_vcppo.slurm.submission import submit
from tools.benchmarks._tiny_chains import TINY, cluster_config, result, wait_for_jobs, write_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        bool(missing_programs()) or not memory_limits_possible(), reason="needs Slurm and cgroups of version 1"
    ),
]


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[DevCluster]:
    cluster = DevCluster(Path(tempfile.mkdtemp(prefix="vcppo_slurm_")), tied=True)
    cluster.up(nodes=1, memory_limits=True)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield cluster
    nodes = cluster.node_names
    cluster.down()
    assert not any(memory_cgroup(node).exists() for node in nodes)


def test_a_rank_that_takes_more_than_requested_is_named_and_more_is_enough(limited: DevCluster, tmp_path: Path) -> None:
    config = cluster_config(tmp_path / "run", ("sft",))
    config.cluster.trainer_nodes, config.cluster.rollout_nodes, config.cluster.crash_retries = 1, 0, 0
    config.sft.checkpoint.save_every = 3
    config.cluster.memory_per_node_gb = 1.5
    config.cluster.environment["TINY_GREED_MB"] = "2000"
    run = write_config(config)
    states = wait_for_jobs(submit(run, config, ["sft"], TINY).values(), 120)
    shown = table(run_status(run, config))
    assert {state.state for state in states.values()} <= {"FAILED", "OUT_OF_MEMORY"}
    assert "was killed by SIGKILL: out of main memory; the plan counts " in shown
    assert "for each of 2 ranks per node, of 1.5 GB requested: request more, or lower" in shown
    config.cluster.memory_per_node_gb = 4
    write_config(config)
    states = wait_for_jobs(submit(run, config, ["sft"], TINY).values(), 120)
    assert {state.state for state in states.values()} == {"COMPLETED"}
    assert result(run)["trained"] == [1, 2, 3, 4, 5, 6]
    assert len(events.of_stage(run.path, "attempt", "sft")) == 2, "a kill without a new checkpoint is not retried"
