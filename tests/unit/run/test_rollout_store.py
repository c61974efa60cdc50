"""Stored rollouts."""

import dataclasses

import pytest
import zstandard

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.run.rollout_store import (
    drop_partial,
    drop_rollouts,
    partial_iterations,
    read_partial,
    read_rollouts,
    stored_iterations,
    write_partial,
    write_rollouts,
)


def make_rollout(index: int, reward: float | None = None) -> Rollout:
    prompt = Prompt(f"chain/{index}", (1, 12, 40), "3 + 4 ?", "7", "running_sum")
    return Rollout(prompt, index, 5, (9, 8, index), f"first line\nseven ½ {index}", (-0.5, -1.25, -1e-7), "stop", 3,
                   reward, "wrong" if reward == 0 else "correct")  # fmt: skip


def test_stored_rollouts_come_back_in_order(tmp_path) -> None:
    rollouts = [make_rollout(i, reward=float(i)) for i in range(5)]
    write_rollouts(tmp_path, 12, rollouts)
    assert read_rollouts(tmp_path, 12) == rollouts
    assert stored_iterations(tmp_path) == [12]
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000012_0of1.jsonl.zst"], "the name in older runs, too"


def test_a_later_attempt_replaces_what_an_earlier_one_stored(tmp_path) -> None:
    write_rollouts(tmp_path, 3, [make_rollout(0), make_rollout(1)])
    write_rollouts(tmp_path, 3, [make_rollout(7)])
    assert [rollout.sample_index for rollout in read_rollouts(tmp_path, 3)] == [7]
    drop_rollouts(tmp_path, 3)
    assert stored_iterations(tmp_path) == []


def test_what_leaders_had_of_an_iteration_is_found_under_any_number_of_them(tmp_path) -> None:
    first, second, third = (make_rollout(i, reward=float(i) if i else None) for i in range(3))
    write_partial(tmp_path, 3, [first], 0, 2)
    write_partial(tmp_path, 3, [second], 1, 2)
    write_partial(tmp_path, 3, [second, third], 0, 1)
    write_partial(tmp_path, -4, [third], 0, 1)
    assert sorted(read_partial(tmp_path, 3), key=lambda rollout: rollout.sample_index) == [first, second, third]
    assert read_partial(tmp_path, -4) == [third] and read_partial(tmp_path, 4) == []
    assert partial_iterations(tmp_path) == [-4, 3] and stored_iterations(tmp_path) == []
    drop_partial(tmp_path, 3)
    assert partial_iterations(tmp_path) == [-4]
    with pytest.raises(UserError, match="no rollouts of iteration 3"):
        read_rollouts(tmp_path, 3)


def test_a_record_says_all_that_was_asked_for(tmp_path) -> None:
    path = write_rollouts(tmp_path, 1, [dataclasses.replace(make_rollout(1), reward=0.25)])
    line = zstandard.open(path, "rt").read()
    for part in ('"token_ids": [1, 12, 40]', '"response_ids": [9, 8, 1]', '"reward": 0.25', '"length": 3',
                 '"finish_reason": "stop"', '"policy_version": 3', '"rollout_logprobs": [-0.5', "½"):  # fmt: skip
        assert part in line
