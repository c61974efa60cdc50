"""Stages that are asked to stop within an iteration: nothing that was generated or trained is lost or done twice."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.errors import SAVED
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.records import Rollout
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import partial_iterations, read_partial, read_rollouts, stored_iterations
from megatron_vcppo.stages import ppo as ppo_module
from tests.helpers.rollout_stages import Stage, make_config
from tests.helpers.stops import ask_to_stop, at_call, hold_responses
from tools.benchmarks._rollout_node import RolloutNode
from tools.benchmarks._tiny_chains import wait_until

PPO: dict[str, Any] = {"iterations": 3, "ppo_epochs": 2, "minibatches": 2, "checkpoint": {"save_every": 100}}
"""Only what is asked for is saved, and the end."""


pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node


def assert_kept(stage: Stage, tag: int, kept: list[Rollout]) -> None:
    """The complete rollouts contain what was kept of them, and that is not there any more."""
    complete = {(r.prompt.prompt_id, r.sample_index): r for r in read_rollouts(stage.folder / "rollouts", tag)}
    assert kept and all(complete[r.prompt.prompt_id, r.sample_index].response_ids == r.response_ids for r in kept)
    assert len(complete) > len(kept) and tag not in partial_iterations(stage.folder / "rollouts")


def newest(stage: Stage) -> dict[str, Any]:
    """state.json of the newest checkpoint."""
    path = max((stage.folder / "checkpoints").glob("iter_*"))
    return json.loads((path / "state.json").read_text())


def learned(stage: Stage) -> list[dict[str, Any]]:
    """The log without times."""
    timed = ("time/", "stopping/", "speed/", "weight_sync/", "timestamp")
    return [{k: v for k, v in record.items() if not k.startswith(timed)} for record in read_metrics(stage.folder)]


def test_a_stop_within_an_iteration_loses_nothing(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """During generation, between two phases, between two optimizer steps, and during the evaluation."""
    config = make_config(task, tmp_path / "run", {"ppo": PPO | {"evaluate_every": 2, "critic": {"init": "sft"}}})
    stage = Stage(node, config, "ppo")
    rollouts = stage.folder / "rollouts"

    assert set(stage.run(lambda: hold_responses(3, ask_to_stop))) == {SAVED}
    kept = read_partial(rollouts, 1)
    assert len(kept) == 3 and stored_iterations(rollouts) == [] and not list(stage.folder.glob("checkpoints/iter_*"))

    # The missing five, then the first call for values comes after that for log-probs.
    assert set(stage.run(lambda: at_call(ppo_module, "token_outputs", 2, lambda: ask_to_stop(1)))) == {SAVED}
    assert_kept(stage, 1, kept)
    assert not list(stage.folder.glob("checkpoints/iter_*")), "the state before the first update needs none"

    # Of the eight optimizer steps of iteration 1 three are done, then three more.
    for done in (3, 6):
        assert set(stage.run(lambda: at_call(Learner, "train_step", 3, lambda: ask_to_stop(1)))) == {SAVED}
        state = newest(stage)
        assert state["iteration"] == 0 and state["state"]["prompts"]["samples_seen"] == 0
        assert sum(map(len, state["state"]["unfinished"]["report"]["skipped"].values())) == done

    # The rest of iteration 1, iteration 2, and part of its evaluation.
    assert set(stage.run(lambda: hold_responses(8 + 2, ask_to_stop))) == {SAVED}
    assert partial_iterations(rollouts) == [-3] and len(read_partial(rollouts, -3)) == 2
    assert [record["iteration"] for record in read_metrics(stage.folder)] == [1]

    assert set(stage.run()) == {0} and partial_iterations(rollouts) == []
    stage.assert_every_prompt_once(8, 3, config.run.seed)
    again = stage.replay(node, tmp_path / "again")
    assert again.checkpoint() == stage.checkpoint() and learned(again) == learned(stage)


@pytest.mark.slow
def test_with_staleness_what_was_begun_ahead_is_kept_too(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """A stop within the update of iteration 1, while engines work on later ones: two replicas keep their shares."""
    layout = {"pp": 1, "dp": 2}
    config = make_config(
        task, tmp_path / "run", {"parallel": layout, "ppo": PPO | {"staleness": 1, "critic": {"init": "sft"}}}
    )
    stage = Stage(node, config, "ppo")
    rollouts = stage.folder / "rollouts"

    def stop_in_the_update() -> None:
        held = hold_responses(4 + 3)  # each leader has half of the prompts

        def stop() -> None:
            wait_until(held, "responses of later iterations on each leader", 60)
            ask_to_stop(1)

        at_call(Learner, "train_step", 5, stop)

    assert set(stage.run(stop_in_the_update)) == {SAVED}
    state = newest(stage)["state"]
    assert state["prompts"]["samples_seen"] == 0 and "unfinished" in state, "iteration 1 is not done"
    kept = read_partial(rollouts, 2)
    assert 2 <= len(kept) <= 6  # finished ones may be in iteration 1
    assert set(stage.run()) == {0}
    complete = {
        (r.prompt.prompt_id, r.sample_index): r for iteration in (1, 2, 3) for r in read_rollouts(rollouts, iteration)
    }
    assert all(complete[r.prompt.prompt_id, r.sample_index].response_ids == r.response_ids for r in kept)
    assert partial_iterations(rollouts) == []
    stage.assert_every_prompt_once(8, 3, config.run.seed)
    again = stage.replay(node, tmp_path / "again")
    assert again.checkpoint() == stage.checkpoint() and learned(again) == learned(stage)


@pytest.mark.slow
def test_value_pretraining_stops_while_a_step_is_generated(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    config = make_config(task, tmp_path / "run", {"value_pretrain": {"steps": 3, "checkpoint": {"save_every": 100}}})
    stage = Stage(node, config, "value_pretrain")
    assert set(stage.run(lambda: hold_responses(8 + 3, ask_to_stop))) == {SAVED}
    kept = read_partial(stage.folder / "rollouts", 2)
    assert len(kept) == 3 and newest(stage)["iteration"] == 1
    assert newest(stage)["state"]["rollouts"]["samples_seen"] == 8
    assert set(stage.run()) == {0}
    assert_kept(stage, 2, kept)
    stage.assert_every_prompt_once(8, 3, config.run.seed + 1)
    assert stage.replay(node, tmp_path / "again").checkpoint() == stage.checkpoint()


def test_an_evaluation_and_a_stored_set_keep_finished_responses(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    found = {"base": str(task / "base_model"), "same": str(task / "base_model")}
    sections: dict[str, dict[str, Any]] = {
        "evaluate": {"stages": ["evaluate"], "evaluate": {"checkpoints": found, "num_samples": 2, "k": [1]}},
        "reward_model": {"stages": ["reward_model"], "reward_model": {"num_prompts": 16, "steps": 1, "batch_size": 4}},
    }
    for name, tag, before in (("evaluate", 1, 16), ("reward_model", 1, 0)):
        stage = Stage(node, make_config(task, tmp_path / name, sections[name]), name)
        assert set(stage.run(partial(hold_responses, before + 3, ask_to_stop))) == {SAVED}
        kept = read_partial(stage.folder / "rollouts", tag)
        assert len(kept) == 3 and partial_iterations(stage.folder / "rollouts") == [tag]
        assert set(stage.run()) == {0}
        assert_kept(stage, tag, kept)


@pytest.mark.slow
def test_under_other_settings_an_interrupted_update_begins_again(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """Its optimizer steps are no longer what the position counts, and its rollouts are another configuration's."""
    config = make_config(task, tmp_path / "run", {"ppo": PPO | {"iterations": 1, "critic": {"init": "sft"}}})
    stage = Stage(node, config, "ppo")
    assert set(stage.run(lambda: at_call(Learner, "train_step", 3, ask_to_stop))) == {SAVED}
    config.ppo.minibatches = 4
    log = tmp_path / "log"

    def redirect() -> None:
        if os.environ["RANK"] == "0":
            sys.stdout = sys.stderr = log.open("w", buffering=1)

    assert set(stage.run(redirect)) == {0}
    text = log.read_text()
    assert "iterations 1 to 1 were generated under other settings (ppo.minibatches)" in text, text
    assert "iteration 1 was interrupted after 3 optimizer steps on other rollouts or under other settings" in text
    assert len(read_metrics(stage.folder)) == 1
