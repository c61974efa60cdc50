"""Which groups dynamic sampling keeps, and warnings about sampling that biases training."""

import random
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
        replays_routing=True,
        generate=generate,
        batches=SimpleNamespace(
            stored=lambda number, prompts, num_samples: stored.get(number), store=stored.__setitem__
        ),
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
    assert sampler.sampling.routed_experts, "the session's engines return them"
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
    seen: list[str] = []

    def stored(number: int, prompts: list[Prompt], num_samples: int) -> RolloutPart:
        seen.extend(prompt.prompt_id for prompt in prompts)
        return RolloutPart()

    session: Any = SimpleNamespace(
        runtime=SimpleNamespace(is_main=True), replays_routing=False, batches=SimpleNamespace(stored=stored)
    )
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


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_every_prompt_is_trained_on_once_over_any_resumes(staleness: int) -> None:
    """Whatever finishes first; each state is a checkpoint from which an attempt continues, as kills do."""
    prompts = [Prompt(str(i), (1,), "", "", "t") for i in range(7)]
    config, chance = Config(), random.Random(staleness)
    config.ppo.prompts_per_iteration, config.ppo.iterations, config.ppo.staleness = 3, 8, staleness
    batches: dict[int, list[str]] = {}

    def stored_among(number: int, among: list[Prompt], count: int, num_samples: int) -> tuple[list[int], RolloutPart]:
        """An attempt before stored what was finished first then."""
        ids = [prompt.prompt_id for prompt in among]
        batches.setdefault(number, chance.sample(ids, count))
        return [ids.index(prompt_id) for prompt_id in batches[number]], RolloutPart()

    session: Any = SimpleNamespace(
        runtime=SimpleNamespace(is_main=True),
        replays_routing=False,
        batches=SimpleNamespace(stored_among=stored_among),
    )
    # A run of staleness 1 from before there were groups: two iterations are done, the third was being generated.
    state: dict[str, Any] = {"samples_seen": 6, "num_samples": 7, "seed": 0}
    iteration, furthest = 3, 0
    while iteration <= 8:
        sampler = PromptSampler(config, session, PromptStream(prompts, 0))
        sampler.load_state_dict(state)
        for _ in range(chance.randint(1, 3)):
            if iteration <= 8:
                sampler.next_batch(iteration)
                furthest = max(furthest, sampler.stream.position)
                iteration += 1
        if chance.random() < 0.5 or iteration > 8:
            state, saved = sampler.state_dict(), iteration
        else:
            iteration = saved if "taken" in state else 3
    wanted = [prompt.prompt_id for prompt in PromptStream(prompts, 0).next(24)][6:]
    assert sorted(prompt_id for batch in batches.values() for prompt_id in batch) == sorted(wanted)
    assert furthest == 24 and "taken" not in state
    assert batches[3] != wanted[:3] or batches[4] != wanted[3:6], "finished first, not in order"
