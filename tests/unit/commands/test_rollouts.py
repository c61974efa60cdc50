"""vcppo rollouts."""

import argparse
from dataclasses import replace

import pytest

from megatron_vcppo.commands import rollouts as command
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.report.samples import choose
from megatron_vcppo.run.rollout_store import (
    write_rollouts,
)


def make_rollout(index: int, reward: float | None = None) -> Rollout:
    prompt = Prompt(f"chain/{index}", (1, 12, 40), "3 + 4 ?", "7", "running_sum")
    return Rollout(prompt, index, 5, (9, 8, index), f"first line\nseven ½ {index}", (-0.5, -1.25, -1e-7), "stop", 3,
                   reward, "wrong" if reward == 0 else "correct")  # fmt: skip


def test_the_command_shows_the_worst_first(tmp_path, capsys) -> None:
    folder = tmp_path / "ppo" / "rollouts"
    write_rollouts(folder, 1, RolloutPart.whole([make_rollout(i, reward=r) for i, r in enumerate((1.0, 0.0, 0.5))]))
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["rollouts", str(tmp_path), "--iteration", "1", "--worst", "2"])
    assert args.run(args) == 0
    shown = capsys.readouterr().out
    assert "3 rollouts, mean reward 0.500, mean length 3.0, 0.0% truncated at the token limit" in shown
    assert shown.index("chain/1 sample 1: reward 0 (wrong)") < shown.index("chain/2 sample 2: reward 0.5")
    assert "chain/0" not in shown and "seven ½ 1" in shown
    with pytest.raises(UserError, match="iteration 9; there are iterations 1 to 1"):
        args = parser.parse_args(["rollouts", str(tmp_path), "--iteration", "9"])
        args.run(args)
    with pytest.raises(UserError, match=r"stages that have some: ppo \(--stage\)"):
        args = parser.parse_args(["rollouts", str(tmp_path), "--stage", "sft"])
        args.run(args)


def test_a_reward_models_score_is_shown_and_ranks_equal_rewards() -> None:
    rollouts = [replace(make_rollout(i, reward=1.0), model_score=score) for i, score in enumerate((0.5, -1.25, 3.0))]
    assert [rollout.sample_index for rollout in command.worst(rollouts, 3)] == [1, 0, 2]
    assert "reward 1 (correct), score -1.250, 3 tokens" in next(command.describe(rollouts[1]))


def test_unfinished_responses_are_counted_and_are_not_the_worst() -> None:
    rollouts = [make_rollout(0, 1.0), replace(make_rollout(1), finish_reason="window"), make_rollout(2, -1.0)]
    assert [rollout.sample_index for rollout in command.worst(rollouts, 3)] == [2, 0]
    assert "3 rollouts, mean reward 0.000, mean length 3.0, 0.0% truncated at the token limit, 1 unfinished, " in (
        command.summary(rollouts)
    )
    samples = choose("ppo", 1, rollouts)
    assert samples.num_rollouts == 2 and {rollout.sample_index for _, rollout in samples.chosen} == {0, 2}


def test_what_a_tool_wrote_is_counted_apart() -> None:
    rollout = replace(make_rollout(0, 1.0), rollout_logprobs=(-0.5, 0.0, -1.5), observations=((1, 2),))
    assert "3 tokens (1 by a tool in 1 calls), ended by stop, mean log-prob -1.000" in next(command.describe(rollout))
