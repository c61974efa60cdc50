"""Stages that generate, killed at random moments beside live engines: nothing is trained twice, or otherwise."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts
from tests.helpers.rollout_node import RolloutNode
from tests.helpers.rollout_stages import Stage, make_config

SECONDS = 4.0
"""A kill comes within this time of the start of an attempt, which takes a little longer."""


pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node


def assert_replays(stage: Stage, node: RolloutNode, folder: Path) -> None:
    """An uninterrupted run on the same rollouts ends with the same bits."""
    assert stage.replay(node, folder).checkpoint() == stage.checkpoint()


def run_both(node: RolloutNode, task: Path, folder: Path, kills: int, changes: dict[str, Any], seed: int) -> list[int]:
    config = make_config(task, folder / "run", changes)
    hits = []
    for name, first in (("value_pretrain", config.run.seed + 1), ("ppo", config.run.seed)):
        stage = Stage(node, config, name)
        hits.append(stage.run_with_kills(kills, SECONDS, seed))
        stage.assert_every_prompt_once(8, 6, first)
        assert_replays(stage, node, folder / f"again_{name}")
    return hits


def test_killed_stages_go_on_as_if_nothing_had_happened(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    hits = run_both(node, task, tmp_path, 2, {}, seed=1)
    assert sum(hits) >= 2, f"kills hit too little: {hits}"


def run_reward_model(node: RolloutNode, task: Path, folder: Path, kills: int, seed: int) -> int:
    settings = {"num_prompts": 16, "steps": 12, "batch_size": 8, "cut_share": 0.25, "checkpoint": {"save_every": 2}}
    sections = {"stages": ["reward_model"], "reward_model": settings}
    stage = Stage(node, make_config(task, folder / "run", sections), "reward_model")
    hits = stage.run_with_kills(kills, SECONDS / 4, seed)  # it is that much shorter
    assert [record["iteration"] for record in read_metrics(stage.folder)] == list(range(1, 13))
    assert_replays(stage, node, folder / "again")
    return hits


def test_a_killed_reward_model_ends_with_the_same_bits(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    assert run_reward_model(node, task, tmp_path, 2, seed=4) >= 1


def test_with_staleness_the_next_batch_is_generated_meanwhile(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    config = make_config(task, tmp_path / "run", {"ppo": {"staleness": 1, "critic": {"init": "sft"}}})
    stage = Stage(node, config, "ppo")
    assert stage.run_with_kills(1, SECONDS, seed=3) <= 1
    stage.assert_every_prompt_once(8, 6, config.run.seed)
    versions = [read_rollouts(stage.folder / "rollouts", i)[0].policy_version for i in range(1, 7)]
    # One update behind, but for the first batch and the first after a resume.
    assert all(version in (i - 2, i - 1) for i, version in enumerate(versions, 1))
    assert versions[0] == 0 and sum(version == i - 2 for i, version in enumerate(versions, 1)) >= 3
    assert_replays(stage, node, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_random_kills(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    hits = []
    for seed in range(5):
        changes = {"ppo": {"staleness": seed % 2, "checkpoint": {"async_save": seed > 2}}}
        hits += run_both(node, task, tmp_path / str(seed), 2, changes, seed)
    hits.append(run_reward_model(node, task, tmp_path / "reward_model", 4, seed=9))
    assert sum(hits) >= 15, f"kills hit too little: {hits}"
