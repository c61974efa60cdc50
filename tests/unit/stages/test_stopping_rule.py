"""When value pretraining stops: after its steps, or once the fit has settled."""

import math

import pytest

from megatron_vcppo.config.rl import ValuePretrainConfig
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


def test_no_rule_before_two_windows() -> None:
    settings = ValuePretrainConfig(steps=100, stop_when_stable=True, stable_window=5)
    assert stopping_reason([[0.5, 0.5]] * 9, settings) is None
    assert stopping_reason([[0.5, 0.5]] * 10, settings) is not None
