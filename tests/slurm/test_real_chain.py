"""The real stages (Megatron ranks, vLLM engines) as a chain of jobs on a real Slurm, with a rank killed in each."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.run import events
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.submission import submitted_jobs
from tests.helpers.clocks import has_compiler, python_with_clocks
from tools.benchmarks._faults import kill_processes, wait_for_checkpoint
from tools.benchmarks._tiny_chains import wait_for_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HOUR = 3600.0


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


@pytest.fixture
def full_home(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own that has no room."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "home", home], check=True)
    try:
        with pytest.raises(OSError, match="No space"):
            (home / "full").write_bytes(bytes(2**20))
        yield home
    finally:
        subprocess.run(["umount", "--lazy", home], check=True)


@pytest.mark.skipif(not has_compiler(), reason="needs a C compiler")
def test_real_stages_where_clocks_differ_and_home_is_full(
    cluster: DevCluster, tmp_path: Path, full_home: Path, capsys
) -> None:
    """The first trainer node is an hour ahead, the second a day behind, the rollout node and this machine are right."""
    recipe = write_recipe(tmp_path)
    ahead, behind = cluster.node_names[:2]
    values = json.loads(recipe.read_text())
    values["cluster"] = {
        "python": str(python_with_clocks(tmp_path, {ahead: HOUR, behind: -24 * HOUR})),
        "setup": [f"export PYTHONPATH={Path.cwd()} HOME={full_home}"],
    }
    recipe.write_text(json.dumps(values))
    assert main(["submit", str(recipe)]) == 0
    run, config = open_run(tmp_path / "run")
    states = wait_for_jobs(submitted_jobs(run).values(), 400)
    assert {state.state for state in states.values()} == {"COMPLETED"}, table(run_status(run, config))
    for stage, total in (("sft", 24), ("ppo", 3)):
        records = [json.loads(line) for line in run.stage(stage).metrics.read_text().splitlines()]
        assert [record["iteration"] for record in records] == list(range(1, total + 1)), stage
        assert len(run.stage(stage).attempts()) == 1
        asked, began = (events.of_stage(run.path, event, stage)[0]["time"] for event in ("submitted", "job"))
        assert HOUR < began - asked < HOUR + 600, "the controller's clock was ahead"
    assert main(["status", str(run.path)]) == 0
    assert capsys.readouterr().out.count("done") >= 3
    assert [path.name for path in full_home.iterdir()] == ["full"], "nothing was left there"
