"""Stages whose reward is a model's: one of Hugging Face or the chain's own, stored scores, a kill in between."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megatron_vcppo.records import Rollout
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts
from tests.helpers.reward_models import save_reward_model
from tests.helpers.rollout_stages import Stage, make_config
from tests.stages.test_rollout_stages import without_engines
from tools.benchmarks._rollout_node import RolloutNode

pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node


@pytest.fixture(scope="module")
def reward_model(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model", task / "base_model", pad=None)


def scores_of(reward_model: Path, rollouts: list[Rollout]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32)
    ids = [torch.tensor([[*r.prompt.token_ids, *r.response_ids]]) for r in rollouts]
    with torch.no_grad():
        return [float(model(input_ids=x).logits) for x in ids]


@pytest.mark.slow
def test_ppo_on_a_models_rewards_continues_after_a_kill(
    node: RolloutNode, task: Path, tmp_path: Path, reward_model: Path
) -> None:
    """The reward is the model's alone; what is trained again has the scores and moments that it had."""
    ppo = {"iterations": 3, "evaluate_every": 0, "checkpoint": {"save_every": 1}, "critic": {"init": "random_head"}}
    rewards = {"model": {"path": str(reward_model), "verifier_weight": 0.0, "weight": 0.5, "clip": 1.5}}
    config = make_config(task, tmp_path / "run", {"stages": ["ppo"], "ppo": ppo, "rewards": rewards})
    stage = Stage(node, config, "ppo")
    stage.run_with_kills(1, seed=1)
    rollouts = [read_rollouts(stage.folder / "rollouts", iteration) for iteration in (1, 2, 3)]
    for batch in rollouts:
        assert [rollout.model_score for rollout in batch] == pytest.approx(scores_of(reward_model, batch), abs=1e-4)
    first, *_, last = read_metrics(stage.folder)
    scores = torch.tensor([rollout.model_score for rollout in rollouts[0]], dtype=torch.float64)
    normalized = ((scores - scores.mean()) / scores.std(correction=0)).clamp(-1.5, 1.5)
    assert first["rollout/reward_mean"] == pytest.approx(0.5 * float(normalized.mean()), abs=1e-4)
    assert first["rollout/reward_std"] == pytest.approx(0.5 * float(normalized.std(correction=0)), abs=1e-4)
    assert first["model_reward/score_mean"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert "model_reward/length_correlation" in last
    again = stage.replay(node, tmp_path / "again")
    assert again.checkpoint() == stage.checkpoint()
    state = again.checkpoint()["state"]["state"]["model_rewards"]
    everything = torch.tensor([r.model_score for batch in rollouts for r in batch], dtype=torch.float64)
    assert state["count"] == 24 and state["mean"] == pytest.approx(float(everything.mean()))


def test_the_chains_reward_model_rewards_ppo_next_to_the_verifier(
    node: RolloutNode, task: Path, tmp_path: Path
) -> None:
    sections = {
        "stages": ["reward_model", "ppo"],
        "reward_model": {"num_prompts": 8, "steps": 2, "batch_size": 4, "optimizer": {"lr": 1e-3}},
        "rewards": {"model": {"stage": "reward_model", "normalize": "none", "clip": None, "weight": 2.0}},
        "ppo": {"iterations": 1, "evaluate_every": 0, "critic": {"init": "reward_model"}},
    }
    config = make_config(task, tmp_path / "run", sections)
    for name in config.stages:
        assert set(Stage(node, config, name).run()) == {0}
    made, trained = (read_rollouts(tmp_path / "run" / name / "rollouts", 1) for name in config.stages)
    assert {rollout.model_score for rollout in made} == {None}, "the stage's own rollouts come before the model"
    rewards = [rollout.reward + 2 * rollout.model_score for rollout in trained]  # type: ignore[operator]
    (metrics,) = read_metrics(tmp_path / "run" / "ppo")
    assert metrics["rollout/reward_mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)


def test_a_set_that_was_made_without_the_model_is_scored_when_it_is_read(
    node: RolloutNode, task: Path, tmp_path: Path, reward_model: Path
) -> None:
    chosen = {"rollouts": "stored", "stored_rollouts": 8, "stored_path": str(tmp_path / "set"), "steps": 1}
    first = Stage(node, make_config(task, tmp_path / "first", {"value_pretrain": chosen}), "value_pretrain")
    assert set(first.run()) == {0} and "model_reward/score_mean" not in read_metrics(first.folder)[0]
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    sections = {"value_pretrain": chosen, "rewards": {"model": {"path": str(reward_model)}}}
    second = without_engines(Stage(node, make_config(task, tmp_path / "second", sections), "value_pretrain"))
    assert set(second.run()) == {0}
    scores = scores_of(reward_model, read_rollouts(tmp_path / "set", 1))
    (metrics,) = read_metrics(second.folder)
    assert metrics["model_reward/score_mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    assert metrics["critic/value_loss"] != read_metrics(first.folder)[0]["critic/value_loss"]
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert json.loads((tmp_path / "set" / "origin.json").read_text()).keys().isdisjoint({"rewards.model"})
