"""Out-of-memory kills are named, with the plan's figures."""

from pathlib import Path

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.launch import memory_kills
from megatron_vcppo.launch.controller import Outcome, reported_code
from tools.benchmarks._tiny_chains import tiny_config

KILLED = Outcome(137, "trainer 1 was killed by SIGKILL", ["a line"])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = tiny_config(tmp_path / "run", ("ppo",), ranks=4)
    config.cluster.memory_per_node_gb = 64
    return config


def test_a_kill_that_the_kernel_counts_is_for_memory(config: Config, tmp_path: Path, monkeypatch) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 1\noom_kill 6\n")
    monkeypatch.setattr(memory_kills, "COUNTER", counter)
    assert memory_kills.named(KILLED, config, "ppo", 6) == KILLED
    counter.write_text("nr_free_pages 1\noom_kill 7\n")
    cause = memory_kills.named(KILLED, config, "ppo", 6).cause
    assert cause.startswith("trainer 1 was killed by SIGKILL: out of main memory; the plan counts ")
    assert "for each of 4 ranks per node, of 64 GB requested: request more, or lower checkpoint.async_save" in cause
    assert "prompts.verify_workers" in cause and "verify_workers" not in memory_kills.advice(config, "sft")
    failed = Outcome(1, "trainer 1 left with exit code 1")
    assert memory_kills.named(failed, config, "ppo", 6) == failed, "what left by itself was not killed"


@pytest.mark.parametrize(
    "line",
    [
        "slurmstepd: error: Detected 1 oom_kill event in StepId=17.0. Some of the step tasks have been OOM Killed.",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=17.0 cgroup.",
        "srun: error: node1: task 3: Out Of Memory",
    ],
)
def test_slurm_says_so(config: Config, line: str) -> None:
    config.cluster.memory_per_node_gb = None
    kills = memory_kills.oom_kills()
    found = memory_kills.named(Outcome(137, "trainer 0 was killed by SIGKILL", [line]), config, "ppo", kills)
    assert "out of main memory" in found.cause and "cluster.memory_per_node_gb is not set" in found.cause


def test_sruns_words_for_it_are_a_kill() -> None:
    assert reported_code("srun: node1: task 3: Out Of Memory\nsrun: node1: task 2: Exited with exit code 1") == 137
