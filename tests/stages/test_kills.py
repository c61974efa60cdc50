"""Stages that generate, killed at random points while engines live: nothing is trained twice, or otherwise."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.mcore.checkpoint import CheckpointFolder
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts
from megatron_vcppo.stages.stored_batches import StoredBatches
from tests.helpers.rollout_stages import KILL_POINTS, KillPoint, Stage, make_config
from tools.benchmarks._rollout_node import RolloutNode

PPO_POINTS = (
    KillPoint(StoredBatches, "store", 2),
    KillPoint(Learner, "train_step", 9),
    KillPoint(CheckpointFolder, "save", 2),
)
"""An iteration has four optimizer steps; two kills leave room for each other in six iterations."""
REWARD_MODEL_POINTS = (KillPoint(Learner, "train_step", 2), KillPoint(CheckpointFolder, "save", 1))
"""Its rollouts are stored once."""

pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node


def assert_replays(stage: Stage, node: RolloutNode, folder: Path) -> None:
    """An uninterrupted run on the same rollouts ends with the same bits."""
    assert stage.replay(node, folder).checkpoint() == stage.checkpoint()


def run_both(node: RolloutNode, task: Path, folder: Path, changes: dict[str, Any], seed: int) -> None:
    config = make_config(task, folder / "run", changes)
    for name, first, points in (
        ("value_pretrain", config.run.seed + 1, KILL_POINTS),
        ("ppo", config.run.seed, PPO_POINTS),
    ):
        stage = Stage(node, config, name)
        stage.run_with_kills(2, seed, points)
        stage.assert_every_prompt_once(8, 6, first)
        assert_replays(stage, node, folder / f"again_{name}")


def test_killed_stages_continue_as_if_nothing_had_happened(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    run_both(node, task, tmp_path, {}, seed=1)


def run_reward_model(node: RolloutNode, task: Path, folder: Path, kills: int, seed: int) -> None:
    settings = {
        "num_prompts": 16,
        "steps": 12,
        "batch_size": 8,
        "truncated_share": 0.25,
        "checkpoint": {"save_every": 2},
    }
    sections = {"stages": ["reward_model"], "reward_model": settings}
    stage = Stage(node, make_config(task, folder / "run", sections), "reward_model")
    stage.run_with_kills(kills, seed, REWARD_MODEL_POINTS)
    assert [record["iteration"] for record in read_metrics(stage.folder)] == list(range(1, 13))
    assert_replays(stage, node, folder / "again")


def test_a_killed_reward_model_ends_with_the_same_bits(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    run_reward_model(node, task, tmp_path, 2, seed=4)


AHEAD: dict[str, dict[str, Any]] = {
    "1": {"staleness": 1},
    "3 dis": {"staleness": 3, "loss": {"kind": "dis", "clip_low": 0.8, "clip_high": 3.0}},
    "2 partial": {"staleness": 2, "partial_rollouts": True, "loss": {"max_logprob_error": 5.0}},
}


@pytest.mark.parametrize(
    "name", ["1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("3 dis", "2 partial"))]
)
def test_with_staleness_engines_work_ahead(name: str, node: RolloutNode, task: Path, tmp_path: Path) -> None:
    staleness = AHEAD[name]["staleness"]
    settings = {"ppo": AHEAD[name] | {"critic": {"init": "sft"}}, "weight_sync": {"pause": "keep"}}
    stage = Stage(node, make_config(task, tmp_path / "run", settings), "ppo")
    stage.run_with_kills(1, seed=3, points=PPO_POINTS)
    stage.assert_every_prompt_once(8, 6, stage.config.run.seed)
    ages = [
        iteration - 1 - rollout.policy_version
        for iteration in range(1, 7)
        for rollout in read_rollouts(stage.folder / "rollouts", iteration)
    ]
    assert min(ages) == 0 and max(ages) >= 1
    if not stage.config.ppo.partial_rollouts:
        assert max(ages) <= staleness
    logged = read_metrics(stage.folder)
    assert max(record["rollout/staleness_max"] for record in logged) == max(ages)
    assert_replays(stage, node, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_four_random_kills(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    for seed in range(5):
        changes = {"ppo": {"staleness": seed % 2, "checkpoint": {"async_save": seed > 2}}}
        run_both(node, task, tmp_path / str(seed), changes, seed)
    run_reward_model(node, task, tmp_path / "reward_model", 4, seed=9)
