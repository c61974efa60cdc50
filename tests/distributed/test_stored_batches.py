"""What leaders store of a batch in the background, and what a later attempt finds of it."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.data.rollout_share import RolloutTable, rows_of
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.rollout_store import (
    partial_iterations,
    read_partial,
    read_rollouts,
    stored_iterations,
    write_partial,
)
from megatron_vcppo.stages import stored_batches
from megatron_vcppo.stages.group_queue import age_metrics
from megatron_vcppo.stages.stored_batches import StoredBatches
from tests.helpers.distributed import RanksFailed, run_distributed_test

PROMPTS = [Prompt(f"p:{i}", (1, 2), "", "", "t") for i in range(5)]


def rollout(prompt: Prompt, sample: int) -> Rollout:
    return Rollout(prompt, sample, 7, (3, 4), "", (-1.0, -2.0), "stop", 0, 1.0)


def open_batches(folder: Path, need_experts: bool = False) -> StoredBatches:
    current = runtime.start(ParallelConfig(), seed=1, timeout_s=60)
    return StoredBatches(folder, current, RankGroup(60), need_experts=need_experts)


def mine(batches: StoredBatches, prompts: list[Prompt]) -> RolloutPart:
    places = batches.places_of(prompts, 2)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return RolloutPart.of((place, rollout(by_id[name], sample)) for (name, sample), place in places.items())


def store(folder: Path) -> bool:
    """Training continues while a batch is written."""
    batches, go_on = open_batches(folder), threading.Event()
    write = stored_batches.write_rollouts

    def slowly(*arguments: Any) -> Path:
        assert go_on.wait(30)
        return write(*arguments)

    stored_batches.write_rollouts = slowly  # type: ignore[assignment]
    part = mine(batches, PROMPTS)
    batches.store(1, part)
    was_there = bool(stored_iterations(folder))
    go_on.set()
    batches.finish()
    again = batches.stored(1, PROMPTS, 2)
    assert again is not None and list(again.items()) == list(part.items())
    return was_there


def find(folder: Path, prompts: list[Prompt]) -> int | None:
    batches = open_batches(folder)
    found = batches.stored(1, prompts, 2)
    if found is not None:
        assert list(found.items()) == list(mine(batches, prompts).items())
    return None if found is None else len(found)


def test_a_batch_is_stored_in_parts_and_found_by_any_number_of_leaders(tmp_path: Path) -> None:
    assert run_distributed_test(store, 2, tmp_path) == [False, False]
    assert [(r.prompt.prompt_id, r.sample_index) for r in read_rollouts(tmp_path, 1)] == [
        (prompt.prompt_id, sample) for prompt in PROMPTS for sample in range(2)
    ]
    assert run_distributed_test(find, 3, tmp_path, PROMPTS) == [4, 4, 2]
    assert run_distributed_test(find, 1, tmp_path, PROMPTS) == [10]
    os.unlink(tmp_path / "iter_0000001_0of2.npz")
    assert run_distributed_test(find, 2, tmp_path, PROMPTS) == [None, None]
    assert partial_iterations(tmp_path) == [1] and len(read_partial(tmp_path, 1)) == 4, "what is there of it is kept"


def test_a_batch_of_other_prompts_is_not_taken(tmp_path: Path) -> None:
    run_distributed_test(store, 2, tmp_path)
    assert run_distributed_test(find, 2, tmp_path, PROMPTS[:4]) == [None, None]
    assert not list(tmp_path.iterdir())


def test_with_routing_replay_only_rollouts_with_experts_are_taken(tmp_path: Path) -> None:
    def body(folder: Path, experts: bytes) -> tuple[int | None, int]:
        batches = open_batches(folder, need_experts=True)
        part = mine(batches, PROMPTS)
        part = RolloutPart(part.places, [replace(one, routed_experts=experts) for one in part.rollouts])
        batches.store(1, part)
        batches.finish()
        write_partial(folder, 2, part, 0, 1)
        write_partial(folder, -2, part, 0, 1)
        found = batches.stored(1, PROMPTS, 2)
        assert found is None or list(found.items()) == list(part.items())
        assert len(batches.kept(-2)) == 10, "those of an evaluation need none"
        return None if found is None else len(found), len(batches.kept(2))

    for name, experts, expected in (("with", b"abc", (10, 10)), ("without", b"", (None, 0))):
        assert run_distributed_test(body, 1, tmp_path / name, experts) == [expected]
        assert bool(stored_iterations(tmp_path / name)) == bool(experts)


def test_a_file_that_cannot_be_written_ends_every_rank(tmp_path: Path) -> None:
    def fail() -> None:
        batches = open_batches(tmp_path)
        if batches.runtime.is_main:
            batches.folder = tmp_path / "file"
            batches.folder.touch()
        batches.store(1, mine(batches, PROMPTS))
        batches.finish()

    with pytest.raises(RanksFailed, match="storing rollouts 1") as failure:
        run_distributed_test(fail, 2)
    assert "on another rank" in str(failure.value)


def find_among(folder: Path, prompts: list[Prompt], count: int) -> tuple[list[int], int] | None:
    batches = open_batches(folder)
    found = batches.stored_among(1, prompts, count, 2)
    return None if found is None else (found[0], len(found[1]))


def test_a_batch_is_found_among_prompts_that_were_taken_ahead(tmp_path: Path) -> None:
    run_distributed_test(store, 2, tmp_path)
    order = [PROMPTS[i] for i in (3, 1, 0)] + [Prompt("q", (1,), "", "", "t")] + [PROMPTS[i] for i in (4, 2)]
    assert run_distributed_test(find_among, 2, tmp_path, order, 5) == [([2, 1, 5, 0, 4], 6), ([2, 1, 5, 0, 4], 4)]
    assert run_distributed_test(find_among, 2, tmp_path, order[:4], 3) == [None, None], "others are in it"
    assert not list(tmp_path.iterdir())


def test_ages_of_tokens_are_those_of_the_whole_batch() -> None:
    def ages() -> dict[str, float]:
        batches = open_batches(Path())
        plain = rollout(PROMPTS[0], 0)
        spanning = replace(plain, policy_version=3, response_ids=(1, 2, 3, 4), version_changes=((1, 4), (3, 6)))
        parts = [RolloutPart.whole([plain]), RolloutPart.whole([spanning])]
        table = RolloutTable(rows_of(RolloutPart.whole([plain, spanning])))
        return age_metrics(parts[batches.runtime.dp_rank], table, policy_version=6)

    # Two tokens of version 0; then one of 3, two of 4, one of 6.
    wanted = {"staleness_mean": (12 + 3 + 4) / 6, "staleness_max": 6.0, "spans_push": 0.5}
    for found in run_distributed_test(ages, 2):
        assert found == pytest.approx({f"rollout/{name}": value for name, value in wanted.items()})
