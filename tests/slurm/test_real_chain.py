"""The real stages (Megatron ranks, vLLM engines) as a chain of jobs on a real Slurm, with a rank killed in each."""

import json
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.run import events
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.submission import submitted_jobs
from tools.benchmarks._faults import kill_processes, wait_for_checkpoint
from tools.benchmarks._tiny_chains import wait_for_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def write_recipe(folder: Path) -> Path:
    """Tiny sizes; a checkpoint at every step that a killed rank may lose."""
    task = folder / "task"
    sizes = ["--demonstrations", "200", "--validation", "16", "--prompts", "64", "--test", "16"]
    assert main(["make-task", "--out", str(task), *sizes]) == 0
    recipe = {
        "defaults": ["demo/vcppo", "cluster/devcluster"],
        "run": {"dir": str(folder / "run"), "timeout_s": 240},
        "model": {"hf": str(task / "base_model")},
        "prompts": {"train": str(task / "prompts_train.jsonl"), "test": str(task / "prompts_test.jsonl")},
        "stages": ["sft", "ppo", "export"],
        "rollout": {"max_tokens": 40},
        "sft": {
            "train": str(task / "sft_train.jsonl"),
            "validation": None,
            "steps": 24,
            "batch_size": 16,
            "schedule": {"warmup_steps": 2},
            "checkpoint": {"save_every": 4},
        },
        "ppo": {
            "iterations": 3,
            "prompts_per_iteration": 16,
            "minibatches": 2,
            "critic": {"init": "sft"},
            "checkpoint": {"save_every": 1},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_real_stages_train_every_iteration_once(cluster: DevCluster, tmp_path: Path, capsys) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["submit", str(recipe)]) == 0
    run, config = open_run(tmp_path / "run")
    for stage in ("sft", "ppo"):
        wait_for_checkpoint(run, stage, 240)
        assert (
            kill_processes(f"megatron_vcppo.stages {stage} --config {run.config}", "RANK=1") >= 1
        )  # its checkpoint writers, too
    states = wait_for_jobs(submitted_jobs(run).values(), 300)
    text = table(run_status(run, config))
    assert {state.state for state in states.values()} == {"COMPLETED"}, text
    assert all(run.stage(stage).is_done() for stage in config.stages)
    for stage, total in (("sft", 24), ("ppo", 3)):
        records = [json.loads(line) for line in run.stage(stage).metrics.read_text().splitlines()]
        assert [record["iteration"] for record in records] == list(range(1, total + 1)), stage
        assert len(run.stage(stage).attempts()) == 2
    rollout_node = events.of_stage(run.path, "job", "ppo")[0]["nodes"][-1]
    engine = f"engine_0_0 at {cluster.node_addresses[rollout_node]}:"
    assert engine in (run.stage("ppo").attempts()[-1] / "rollout_0.log").read_text(), "not on its node's own address"
    assert main(["status", str(run.path)]) == 0
    assert capsys.readouterr().out.count("done") >= 3
