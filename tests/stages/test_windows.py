"""PPO on responses in windows, with live engines and a kill: every token is trained on once, and a replay is equal."""

from pathlib import Path

import pytest

from megatron_vcppo.records import Rollout
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts
from tests.helpers.rollout_stages import Stage, make_config
from tests.stages.test_kills import PPO_POINTS, assert_replays
from tools.benchmarks._rollout_node import RolloutNode

pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node


@pytest.mark.slow
def test_a_killed_run_continues_its_unfinished_responses(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """Windows of 10 of at most 24 tokens, which the untrained model always uses up."""
    settings = {"ppo": {"window_tokens": 10, "critic": {"init": "sft"}, "iterations": 4}}
    stage = Stage(node, make_config(task, tmp_path / "run", settings), "ppo")
    stage.run_with_kills(1, seed=5, points=PPO_POINTS)
    trained: dict[str, Rollout] = {}
    for iteration, record in enumerate(read_metrics(stage.folder), 1):
        batch = read_rollouts(stage.folder / "rollouts", iteration)
        assert len(batch) == 8 and record["iteration"] == iteration
        for rollout in batch:
            assert rollout.continues(trained.get(rollout.prompt.prompt_id))
            assert (rollout.reward is None) == rollout.unfinished
            num_new = len(rollout.response_ids) - rollout.num_trained
            assert list(rollout.versions()) == [(iteration - 1, num_new)]
            assert num_new == 10 or not rollout.unfinished
            trained[rollout.prompt.prompt_id] = rollout
        new_tokens = sum(len(rollout.response_ids) - rollout.num_trained for rollout in batch)
        assert record["rollout/tokens"] == new_tokens and record["rollout/staleness_max"] == 0
        num_finished = sum(not rollout.unfinished for rollout in batch)
        assert record.get("rollout/unfinished_share", 0.0) == 1 - num_finished / 8
        assert ("rollout/accuracy" in record) == (num_finished > 0) == ("critic/value_loss" in record)
        assert record["rollout/logprob_gap"] < 1e-3, "the prefix is not what the engine continued"
    assert max(len(rollout.response_ids) for rollout in trained.values()) == 24
    assert_replays(stage, node, tmp_path / "again")
