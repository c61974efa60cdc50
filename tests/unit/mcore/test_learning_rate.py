"""The learning rate over optimizer steps: both shapes, their ends, and what follows the planned end."""

import pytest

from megatron_vcppo.config import ScheduleConfig
from megatron_vcppo.mcore.optimizer import learning_rate


def rates(total: int, schedule: ScheduleConfig, steps: int | None = None) -> list[float]:
    return [learning_rate(step, total, 2.0, schedule) for step in range(steps or total)]


def test_constant_after_a_linear_warm_up() -> None:
    assert rates(6, ScheduleConfig("constant", warmup_steps=4)) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(3, ScheduleConfig("constant")) == [2.0, 2.0, 2.0]


def test_half_a_cosine_from_the_peak_to_the_floor() -> None:
    ours = rates(7, ScheduleConfig("cosine", warmup_steps=2, min_lr_ratio=0.1))
    # steps 2 … 6 are 0, 1/4, … 1 of the way from 2.0 down to 0.2
    half = (1 - 0.5**0.5) / 2
    assert ours == pytest.approx([1.0, 2.0, 2.0, 2.0 - 1.8 * half, 1.1, 0.2 + 1.8 * half, 0.2])


def test_the_cosine_stays_at_its_floor_beyond_the_planned_end() -> None:
    schedule = ScheduleConfig("cosine", min_lr_ratio=0.5)
    assert rates(3, schedule, steps=6) == pytest.approx([2.0, 1.5, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_short_runs_are_finite_and_reach_the_peak(warmup: int) -> None:
    schedule = ScheduleConfig("cosine", warmup_steps=warmup, min_lr_ratio=0.1)
    assert max(rates(max(1, warmup), schedule)) == 2.0
    assert all(0 < rate <= 2.0 for rate in rates(warmup + 1, schedule))
