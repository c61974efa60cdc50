"""Stored rollouts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.rollout_store import (
    drop_experts,
    drop_other_parts,
    drop_partial,
    drop_rollouts,
    iterate_rollouts,
    keep_as_partial,
    partial_iterations,
    read_partial,
    read_places,
    read_rollouts,
    stored_iterations,
    write_partial,
    write_rollouts,
)


def make_rollout(index: int, reward: float | None = None) -> Rollout:
    prompt = Prompt(f"chain/{index}", (1, 12, 40), "3 + 4 ?", "7", "running_sum")
    return Rollout(prompt, index, 5, (9, 8, index), f"first line\nseven ½ {index}", (-0.5, -1.25, -1e-7), "stop", 3,
                   reward, "wrong" if reward == 0 else "correct")  # fmt: skip


def test_stored_rollouts_come_back_in_order(tmp_path: Path) -> None:
    rollouts = [make_rollout(i, reward=float(i)) for i in range(5)]
    write_rollouts(tmp_path, 12, RolloutPart.whole(rollouts))
    assert read_rollouts(tmp_path, 12) == rollouts
    assert stored_iterations(tmp_path) == [12]
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000012_0of1.npz"]


def test_policy_versions_of_tokens_come_back(tmp_path: Path) -> None:
    spanning = dataclasses.replace(make_rollout(0), version_changes=((1, 4), (2, 6)))
    write_rollouts(tmp_path, 1, RolloutPart.whole([spanning, make_rollout(1)]))
    assert read_rollouts(tmp_path, 1) == [spanning, make_rollout(1)]
    assert [*read_rollouts(tmp_path, 1)[0].versions()] == [(3, 1), (4, 1), (6, 1)]
    assert [*make_rollout(1).versions()] == [(3, 3)]


def test_a_later_attempt_replaces_what_an_earlier_one_stored(tmp_path) -> None:
    write_rollouts(tmp_path, 3, RolloutPart.whole([make_rollout(0), make_rollout(1)]))
    write_rollouts(tmp_path, 3, RolloutPart.whole([make_rollout(7)]))
    assert [rollout.sample_index for rollout in read_rollouts(tmp_path, 3)] == [7]
    drop_rollouts(tmp_path, 3)
    assert stored_iterations(tmp_path) == []


def test_what_leaders_had_of_an_iteration_is_found_under_any_number_of_them(tmp_path) -> None:
    first, second, third = (make_rollout(i, reward=float(i) if i else None) for i in range(3))
    write_partial(tmp_path, 3, RolloutPart.whole([first]), 0, 2)
    write_partial(tmp_path, 3, RolloutPart.whole([second]), 1, 2)
    write_partial(tmp_path, 3, RolloutPart.whole([second, third]), 0, 1)
    write_partial(tmp_path, -4, RolloutPart.whole([third]), 0, 1)
    assert sorted(read_partial(tmp_path, 3), key=lambda rollout: rollout.sample_index) == [first, second, third]
    assert read_partial(tmp_path, -4) == [third] and read_partial(tmp_path, 4) == []
    assert partial_iterations(tmp_path) == [-4, 3] and stored_iterations(tmp_path) == []
    drop_partial(tmp_path, 3)
    assert partial_iterations(tmp_path) == [-4]
    with pytest.raises(UserError, match="no rollouts of iteration 3"):
        read_rollouts(tmp_path, 3)


def test_a_file_is_read_without_this_project(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 1, RolloutPart.of([(4, dataclasses.replace(make_rollout(1), reward=0.25))]))
    content = np.load(path, allow_pickle=False)
    assert int(content["schema"]) == 2 and content["places"].tolist() == [4]
    assert content["prompt_ids"].tolist() == [1, 12, 40] and content["response_ids"].tolist() == [9, 8, 1]
    assert content["prompt_lengths"].tolist() == content["response_lengths"].tolist() == [3]
    assert content["rollout_logprobs"].tolist() == [-0.5, -1.25, np.float32(-1e-7)]
    record = json.loads(content["records"].tobytes())
    assert record["prompt"] == {"prompt_id": "chain/1", "text": "3 + 4 ?", "answer": "7", "task": "running_sum"}
    del record["prompt"]
    assert record == {
        "sample_index": 1,
        "seed": 5,
        "response_text": "first line\nseven ½ 1",
        "finish_reason": "stop",
        "policy_version": 3,
        "reward": 0.25,
        "model_score": None,
        "verdict": "correct",
        "length": 3,
    }


def test_an_iteration_is_stored_when_every_part_is_there(tmp_path: Path) -> None:
    rollouts = [make_rollout(i) for i in range(5)]
    parts = [RolloutPart.of((i, rollouts[i]) for i in range(5) if i % 3 == k) for k in range(3)]
    write_rollouts(tmp_path, 2, parts[2], 2, 3)
    write_rollouts(tmp_path, 2, parts[0], 0, 3)
    with pytest.raises(UserError, match="no rollouts of iteration 2"):
        read_rollouts(tmp_path, 2)
    keep_as_partial(tmp_path, 2)
    assert sorted(r.sample_index for r in read_partial(tmp_path, 2)) == [0, 2, 3]
    for k in range(3):
        write_rollouts(tmp_path, 2, parts[k], k, 3)
    assert read_rollouts(tmp_path, 2) == rollouts and stored_iterations(tmp_path) == [2]
    assert sorted(r.sample_index for r in iterate_rollouts(tmp_path, 2)) == [0, 1, 2, 3, 4]
    assert read_places(tmp_path, 2, lambda place, _: place > 2) == RolloutPart([3, 4], rollouts[3:])


def test_another_number_of_leaders_and_an_empty_part(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 2, RolloutPart.whole([make_rollout(0)]), 0, 3)
    drop_other_parts(tmp_path, 2, 2)
    write_rollouts(tmp_path, 2, RolloutPart.whole([make_rollout(9)]), 0, 2)
    write_rollouts(tmp_path, 2, RolloutPart(), 1, 2)
    assert read_rollouts(tmp_path, 2) == [make_rollout(9)] and len(list(tmp_path.iterdir())) == 2


def test_files_of_schema_1_are_read_and_newer_ones_are_refused(tmp_path: Path) -> None:
    rollouts = [make_rollout(i, reward=1.0) for i in range(2)]
    lines = []
    for rollout in rollouts:
        tokens = {"response_ids": [*rollout.response_ids], "rollout_logprobs": [*rollout.rollout_logprobs]}
        record = vars(rollout) | {"prompt": vars(rollout.prompt), "length": 3} | tokens
        del record["routed_experts"]
        lines.append(json.dumps(record))
    content = zstandard.compress("\n".join(lines).encode())
    (tmp_path / "iter_0000003_0of1.jsonl.zst").write_bytes(content)
    (tmp_path / "partial_0000004_0of1.jsonl.zst").write_bytes(content)
    assert read_rollouts(tmp_path, 3) == read_partial(tmp_path, 4) == rollouts and stored_iterations(tmp_path) == [3]
    np.savez(tmp_path / "iter_0000005_0of1.npz", schema=3)
    with pytest.raises(UserError, match="rollouts of schema 3; this version reads 2"):
        read_rollouts(tmp_path, 5)


def test_spans_of_a_tool_come_back_and_are_stored_only_where_there_are_any(tmp_path: Path) -> None:
    rollouts = [dataclasses.replace(make_rollout(0, 1.0), observations=((1, 2),)), make_rollout(1, 1.0)]
    path = write_rollouts(tmp_path, 1, RolloutPart.whole(rollouts))
    found = read_rollouts(tmp_path, 1)
    assert found == rollouts and found[0].observations == ((1, 2),) and found[1].observations == ()
    records = np.load(path)["records"].tobytes().decode().splitlines()
    assert ["observations" in json.loads(line) for line in records] == [True, False]


def with_experts(index: int, length: int = 5) -> Rollout:
    return dataclasses.replace(make_rollout(index, 1.0), routed_experts=bytes(range(index, index + 4 * length)))


def test_experts_come_back_for_training_until_they_are_dropped(tmp_path: Path) -> None:
    rollouts = [with_experts(0), with_experts(1, 3)]
    for iteration in (1, 2):
        write_rollouts(tmp_path, iteration, RolloutPart.whole(rollouts))
    write_partial(tmp_path, 3, RolloutPart.whole(rollouts[:1]), 0, 1)
    bare = [dataclasses.replace(rollout, routed_experts=b"") for rollout in rollouts]
    assert read_places(tmp_path, 1).rollouts == rollouts and read_partial(tmp_path, 3) == rollouts[:1]
    assert read_rollouts(tmp_path, 1) == [*iterate_rollouts(tmp_path, 1)] == bare, "reports read no experts"
    assert np.load(tmp_path / "iter_0000001_0of1.experts.npy").tobytes() == b"".join(r.routed_experts for r in rollouts)
    drop_experts(tmp_path, 1)
    assert read_places(tmp_path, 1).rollouts == bare and read_places(tmp_path, 2).rollouts == rollouts
    keep_as_partial(tmp_path, 2)
    assert read_partial(tmp_path, 2) == rollouts and stored_iterations(tmp_path) == [1]
    drop_partial(tmp_path, 2)
    drop_partial(tmp_path, 3)
    drop_rollouts(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_experts_of_another_attempt_are_not_taken(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 1, RolloutPart.whole([with_experts(0)]))
    before = path.read_bytes()
    write_rollouts(tmp_path, 1, RolloutPart.whole([with_experts(9)]))
    path.write_bytes(before)  # a kill came between the two files
    (found,) = read_places(tmp_path, 1).rollouts
    assert found.routed_experts == b"" and found.sample_index == 0
    write_rollouts(tmp_path, 1, RolloutPart.whole([make_rollout(0)]), 1, 2)
    drop_other_parts(tmp_path, 1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001_1of2.npz"]
