"""Which groups dynamic sampling keeps, and warnings about sampling that biases training."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vcppo.config import Config, RolloutConfig
from megatron_vcppo.data.prompts import PromptStream
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.stages.prompt_sampler import PromptSampler, training_sampling, unequal_groups


def test_only_groups_with_different_rewards_teach() -> None:
    def sample(name: str, index: int, reward: float) -> Rollout:
        return Rollout(Prompt(name, (1,), "", "", "t"), index, 0, (2,), "", (-1.0,), "stop", 0, reward)

    rollouts = [sample("a", 0, 1.0), sample("b", 0, 1.0), sample("a", 1, 1.0), sample("b", 1, -1.0)]
    assert [(r.prompt.prompt_id, r.sample_index) for r in unequal_groups(RolloutPart.whole(rollouts)).rollouts] == [
        ("b", 0),
        ("b", 1),
    ]
    assert not len(unequal_groups(RolloutPart()))


def test_a_filtered_distribution_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    training_sampling(RolloutConfig(top_p=0.9, top_k=20), is_main=True)
    assert capsys.readouterr().out.startswith(
        "warning: rollout.top_p = 0.9 and rollout.top_k = 20: responses are drawn"
    )
    training_sampling(RolloutConfig(top_p=0.9), is_main=False)
    assert not capsys.readouterr().out


def test_plain_sampling_does_not_warn(capsys: pytest.CaptureFixture[str]) -> None:
    assert training_sampling(RolloutConfig(temperature=0.7, stop=["END"]), is_main=True).stop == ["END"]
    assert not training_sampling(RolloutConfig(), is_main=True).ignore_eos
    assert training_sampling(RolloutConfig(ignore_eos=True), is_main=True).ignore_eos
    assert not capsys.readouterr().out


def test_rollouts_are_scored_once_before_they_are_stored() -> None:
    """Generated in their turn, and stored by an attempt before."""
    stored: dict[int, RolloutPart] = {}

    def generate(prompts: list[Prompt], *_: Any) -> RolloutPart:
        return RolloutPart.whole([Rollout(prompt, 0, 0, (2,), "", (-1.0,), "stop", 0, 1.0) for prompt in prompts])

    session: Any = SimpleNamespace(
        runtime=SimpleNamespace(is_main=True),
        generate=generate,
        stored=lambda number, prompts, num_samples: stored.get(number),
        store=stored.__setitem__,
    )
    config = Config()
    config.ppo.prompts_per_iteration = 2
    num_scored = 0

    def score(part: RolloutPart) -> RolloutPart:
        nonlocal num_scored
        num_scored += len(part)
        return RolloutPart(part.places, [replace(rollout, model_score=0.5) for rollout in part.rollouts])

    prompts = [Prompt(str(i), (1,), "", "", "t") for i in range(8)]
    sampler = PromptSampler(config, session, PromptStream(prompts, 0), score)
    first = sampler.next_batch(1)
    second = sampler.next_batch(2)
    assert stored == {1: first, 2: second} and num_scored == 4
    assert {rollout.model_score for rollout in (*first.rollouts, *second.rollouts)} == {0.5}
    assert sampler.next_batch(2) == second and num_scored == 4


def test_what_was_taken_ahead_is_trained_on_when_staleness_becomes_zero() -> None:
    """A checkpoint of a run with staleness; and one of a run without, or from before it had a list."""
    prompts = [Prompt(str(i), (1,), "", "", "t") for i in range(5)]
    config = Config()
    config.ppo.prompts_per_iteration = 3
    session: Any = SimpleNamespace(runtime=SimpleNamespace(is_main=True), stored=lambda *_: RolloutPart())
    seen: list[str] = []

    def stored(number: int, prompts: list[Prompt], num_samples: int) -> RolloutPart:
        seen.extend(prompt.prompt_id for prompt in prompts)
        return RolloutPart()

    session.stored = stored
    sampler = PromptSampler(config, session, PromptStream(prompts, 0))
    stream = PromptStream(prompts, 0)
    wanted = [prompt.prompt_id for prompt in stream.next(13)]
    sampler.load_state_dict({"samples_seen": 7, "num_samples": 5, "seed": 0, "taken": [[1, 1], [4, 2], [5, 2], [6, 3]]})
    for iteration in (2, 3):
        sampler.next_batch(iteration)
    assert seen == [wanted[place] for place in (1, 4, 5, 6, 7, 8)]
    assert sampler.state_dict() == {"samples_seen": 9, "num_samples": 5, "seed": 0}
    sampler.load_state_dict(sampler.state_dict())
    sampler.next_batch(4)
    assert seen[6:] == wanted[9:12]
