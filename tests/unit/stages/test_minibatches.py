"""How a batch is divided into minibatches."""

import pytest

from megatron_vcppo.stages.updates import minibatches


@pytest.mark.parametrize(("count", "parts"), [(16, 4), (10, 3), (3, 8), (1, 1)])
def test_minibatches_are_a_partition(count: int, parts: int) -> None:
    found = minibatches(count, parts, run_seed=1, iteration=2, ppo_epoch=0)
    assert sorted(index for part in found for index in part) == list(range(count))
    assert len(found) == min(count, parts) and max(map(len, found)) - min(map(len, found)) <= 1


def test_minibatches_are_a_function_of_seed_iteration_and_epoch() -> None:
    keys = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    drawn = [minibatches(64, 4, *key) for key in keys]
    assert drawn == [minibatches(64, 4, *key) for key in keys]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
