"""Real stages whose iterations are longer than run.timeout_s and than the margin before the time limit."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.cli import main
from megatron_vcppo.config.load import load_config
from megatron_vcppo.errors import SAVED
from megatron_vcppo.launch.local_chain import run_chain
from megatron_vcppo.run import events
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.slurm.chain_status import run_status, table
from megatron_vcppo.slurm.devcluster import DevCluster
from megatron_vcppo.slurm.submission import submitted_jobs
from tools.benchmarks._tiny_chains import wait_for_jobs, wait_until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

TIMEOUT_S = 20.0
MINIBATCHES = 24


def write_recipe(folder: Path, ppo_epochs: int, cluster: dict[str, Any]) -> Path:
    """One rank; two iterations of many optimizer steps; nothing is saved but on request and at the end."""
    task = folder / "task"
    sizes = ["--demonstrations", "200", "--validation", "16", "--prompts", "64", "--test", "16"]
    assert main(["make-task", "--out", str(task), *sizes]) == 0
    recipe = {
        "defaults": ["demo/vcppo", *(["cluster/devcluster"] if cluster else [])],
        "run": {"dir": str(folder / "run"), "timeout_s": TIMEOUT_S},
        "model": {"hf": str(task / "base_model")},
        "parallel": {"pp": 1},
        "prompts": {"train": str(task / "prompts_train.jsonl"), "test": str(task / "prompts_test.jsonl")},
        "stages": ["ppo"],
        "rollout": {"max_tokens": 40},
        "ppo": {
            "iterations": 2,
            "prompts_per_iteration": 48,
            "minibatches": MINIBATCHES,
            "ppo_epochs": ppo_epochs,
            "critic": {"init": "random_head"},
            "checkpoint": {"save_every": 100},
        },
        "cluster": cluster,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def attempts_of(run: RunFolder) -> list[dict[str, Any]]:
    return events.of_stage(run.path, "attempt_end", "ppo")


def assert_trained_once(run: RunFolder) -> None:
    """Each iteration is logged once, on prompts of its own, and nothing of an interruption is left."""
    assert [record["iteration"] for record in run.stage("ppo").recent_metrics()] == [1, 2]
    state = json.loads((run.stage("ppo").checkpoint(2) / "state.json").read_text())["state"]
    assert state["prompts"]["samples_seen"] == 96 and "unfinished" not in state
    assert sorted(path.name for path in run.stage("ppo").rollouts.glob("iter_*")) == [
        f"iter_000000{iteration}_0of1.npz" for iteration in (1, 2)
    ]


def test_a_stop_after_more_than_the_time_out_keeps_the_iteration(tmp_path: Path) -> None:
    ppo_epochs = 120  # 40 s an iteration on an idle core: it must outlast the request
    config = load_config(write_recipe(tmp_path, ppo_epochs, {}))
    run = write_config(config)

    def ask() -> None:
        wait_until(lambda: list(run.stage("ppo").rollouts.glob("iter_*")), "the rollouts of iteration 1", 300)
        time.sleep(1.1 * TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGUSR2)

    asker = threading.Thread(target=ask)
    asker.start()
    assert run_chain(run, config, ["ppo"]) == SAVED
    asker.join()
    (end,) = attempts_of(run)
    assert end["leaving_s"] < TIMEOUT_S, "it leaves between two steps, not at the end of the iteration"
    iteration, steps, complete, _ = run.stage("ppo").progress(run.stage("ppo").rollouts)
    assert (iteration, complete) == (0, 1) and 0 < steps < 2 * MINIBATCHES * ppo_epochs
    assert run.stage("ppo").recent_metrics() == [], "the iteration is longer than the time until the request"
    assert run_chain(run, config, ["ppo"]) == 0
    assert_trained_once(run)


def test_a_job_with_iterations_longer_than_its_margin_ends_by_requeues(cluster: DevCluster, tmp_path: Path) -> None:
    ppo_epochs = 100
    layout = {"trainer_nodes": 1, "trainer_ranks": 1, "time_limit_minutes": 3, "save_margin_s": 15}
    assert main(["submit", str(write_recipe(tmp_path, ppo_epochs, layout))]) == 0
    run, config = open_run(tmp_path / "run")
    states = wait_for_jobs(submitted_jobs(run).values(), 2100)
    text = table(run_status(run, config))
    assert {state.state for state in states.values()} == {"COMPLETED"}, text
    ends = attempts_of(run)
    # The last one may be asked to stop when its work is done: then the next start finds the stage done.
    stopped = [end for end in ends if end["code"] == SAVED]
    assert stopped and {end["code"] for end in ends[:-1]} == {SAVED} and ends[-1]["code"] in (0, SAVED), ends
    assert len(events.of_stage(run.path, "requeue", "ppo")) == len(stopped)
    reached = [event["progress"] for event in events.of_stage(run.path, "job", "ppo")]
    assert reached == sorted(reached) and len({tuple(progress) for progress in reached}) == len(reached), reached
    print(f"progress at each start: {reached}; seconds to leave: {[end['leaving_s'] for end in stopped]}")
    assert_trained_once(run)
