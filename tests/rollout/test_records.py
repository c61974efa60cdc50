"""Seeds, sampling warnings, stored rollouts and the command that shows them."""

import argparse
import dataclasses

import pytest
import zstandard

from megatron_vcppo.commands import rollouts as command
from megatron_vcppo.config.rollout import RolloutConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout.client import RolloutClient
from megatron_vcppo.rollout.seeds import sample_seed, training_sampling
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


def test_seeds_are_the_same_in_every_process_and_differ_in_every_part() -> None:
    assert sample_seed(0, 1, "chain/17", 2) == 413058873
    parts = [(0, 1, "a", 2), (1, 1, "a", 2), (0, 2, "a", 2), (0, 1, "b", 2), (0, 1, "a", 3), (0, 12, "a", 2)]
    seeds = [sample_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    many = [sample_seed(3, i, f"p{p}", s) for i in range(10) for p in range(40) for s in range(5)]
    assert all(0 <= seed < 2**31 for seed in many) and len(set(many)) == len(many)


def test_cutting_the_distribution_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"rollout\.top_p = 0\.9 and rollout\.top_k = 20.*renormalised"):
        training_sampling(RolloutConfig(top_p=0.9, top_k=20))


@pytest.mark.filterwarnings("error")
def test_plain_sampling_does_not_warn() -> None:
    assert training_sampling(RolloutConfig(temperature=0.7, stop=["END"])).stop == ["END"]
    assert (
        not training_sampling(RolloutConfig()).ignore_eos
        and training_sampling(RolloutConfig(ignore_eos=True)).ignore_eos
    )


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


def test_responses_that_are_known_are_not_requested_again(tmp_path) -> None:
    client = RolloutClient(tmp_path, RolloutConfig(), 64, run_seed=7, decode=str)
    prompts = [make_rollout(i).prompt for i in range(2)]
    everything = client.plan(prompts, 1, 2)
    known = {(item.prompt.prompt_id, item.sample_index, item.request.seed) for item in everything[:3]}
    (left,) = client.plan(prompts, 1, 2, known)
    assert (left.prompt, left.sample_index) == (prompts[1], 1) and left.request.seed == everything[3].request.seed
    assert len(client.plan(prompts, 2, 2, known)) == 4, "another iteration has other seeds"


def test_a_record_says_all_that_was_asked_for(tmp_path) -> None:
    path = write_rollouts(tmp_path, 1, [dataclasses.replace(make_rollout(1), reward=0.25)])
    line = zstandard.open(path, "rt").read()
    for part in ('"token_ids": [1, 12, 40]', '"response_ids": [9, 8, 1]', '"reward": 0.25', '"length": 3',
                 '"finish_reason": "stop"', '"policy_version": 3', '"rollout_logprobs": [-0.5', "½"):  # fmt: skip
        assert part in line


def test_the_command_shows_the_worst_first(tmp_path, capsys) -> None:
    folder = tmp_path / "ppo" / "rollouts"
    write_rollouts(folder, 1, [make_rollout(i, reward=r) for i, r in enumerate((1.0, 0.0, 0.5))])
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["rollouts", str(tmp_path), "--iteration", "1", "--worst", "2"])
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "3 rollouts, mean reward 0.500, mean length 3.0, 0.0% cut" in shown
    assert shown.index("chain/1 sample 1: reward 0 (wrong)") < shown.index("chain/2 sample 2: reward 0.5")
    assert "chain/0" not in shown and "seven ½ 1" in shown
    with pytest.raises(UserError, match="iteration 9; there are iterations 1 to 1"):
        args = parser.parse_args(["rollouts", str(tmp_path), "--iteration", "9"])
        args.run(args)
    with pytest.raises(UserError, match=r"stages that have some: ppo \(--stage\)"):
        args = parser.parse_args(["rollouts", str(tmp_path), "--stage", "sft"])
        args.run(args)
