"""Pure rules of the stages: when pretraining stops, which groups teach, how a batch is cut into minibatches."""

import math

import pytest

from megatron_vcppo.config import ValuePretrainConfig
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.nonfinite import NonfiniteUpdates
from megatron_vcppo.stages.prompt_sampler import unequal_groups
from megatron_vcppo.stages.updates import minibatches
from megatron_vcppo.stages.value_pretrain import stopping_reason

SETTLING = [[1 - 0.5**step, 0.5 + 0.5**step] for step in range(40)]


def test_exactly_n_steps_means_n() -> None:
    settings = ValuePretrainConfig(steps=3)
    assert stopping_reason(SETTLING[:2], settings) is None
    assert stopping_reason(SETTLING[:3], settings) == "value_pretrain.steps 3"


def test_stops_when_both_have_settled_and_says_so() -> None:
    settings = ValuePretrainConfig(steps=40, stop_when_stable=True, stable_window=4, stable_tolerance=0.01)
    stopped = next(n for n in range(41) if stopping_reason(SETTLING[:n], settings))
    assert 8 < stopped < 20
    reason = stopping_reason(SETTLING[:stopped], settings)
    assert reason is not None and "over the last 4 steps" in reason and "stable_tolerance 0.01" in reason
    assert stopping_reason(SETTLING[: stopped - 1], settings) is None


@pytest.mark.parametrize("column", [0, 1])
def test_one_that_still_moves_is_enough_to_go_on(column: int) -> None:
    settings = ValuePretrainConfig(steps=100, stop_when_stable=True, stable_window=4, stable_tolerance=0.01)
    history = [[0.5, 0.5] for _ in range(20)]
    assert stopping_reason(history, settings)
    for step, row in enumerate(history):
        row[column] += 0.05 * step
    assert stopping_reason(history, settings) is None


def test_a_loss_that_is_not_a_number_is_not_stable() -> None:
    settings = ValuePretrainConfig(steps=100, stop_when_stable=True, stable_window=2)
    assert stopping_reason([[0.5, math.nan]] * 10, settings) is None


def test_skipped_updates_are_counted_for_each_model_alone() -> None:
    skips = NonfiniteUpdates(limit=3)
    assert skips.count({"actor": [False, False], "critic": [False]}) == "" and not skips.too_many
    text = skips.count({"critic": [False, False], "actor": [False, True]})
    assert text == "skipped 1 of 2 updates of the actor (1 in a row): loss or gradient was not finite"
    again = NonfiniteUpdates(3, dict(skips.in_a_row))  # as after a resume
    again.count({"critic": [False, False], "actor": [True, True]})
    assert again.too_many
    assert "3 updates of the actor in a row" in str(again.error("ppo", 7)) and "iteration 7" in str(
        again.error("ppo", 7)
    )
    again.count({"actor": [False]})
    assert not again.too_many


def test_no_rule_before_two_windows() -> None:
    settings = ValuePretrainConfig(steps=100, stop_when_stable=True, stable_window=5)
    assert stopping_reason([[0.5, 0.5]] * 9, settings) is None
    assert stopping_reason([[0.5, 0.5]] * 10, settings) is not None


@pytest.mark.parametrize(("count", "parts"), [(16, 4), (10, 3), (3, 8), (1, 1)])
def test_minibatches_are_a_partition(count: int, parts: int) -> None:
    found = minibatches(count, parts, seed=1, iteration=2, ppo_epoch=0)
    assert sorted(index for part in found for index in part) == list(range(count))
    assert len(found) == min(count, parts) and max(map(len, found)) - min(map(len, found)) <= 1


def test_minibatches_are_a_function_of_seed_iteration_and_epoch() -> None:
    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    drawn = [minibatches(64, 4, *key) for key in keys]
    assert drawn == [minibatches(64, 4, *key) for key in keys]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


def test_only_groups_with_different_rewards_teach() -> None:
    def sample(name: str, index: int, reward: float) -> Rollout:
        return Rollout(Prompt(name, (1,), "", "", "t"), index, 0, (2,), "", (-1.0,), "stop", 0, reward)

    rollouts = [sample("a", 0, 1.0), sample("b", 0, 1.0), sample("a", 1, 1.0), sample("b", 1, -1.0)]
    assert [(r.prompt.prompt_id, r.sample_index) for r in unequal_groups(rollouts)] == [("b", 0), ("b", 1)]
    assert unequal_groups([]) == []
