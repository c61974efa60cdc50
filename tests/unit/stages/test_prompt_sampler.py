"""Which groups dynamic sampling keeps, and warnings about sampling that biases training."""

import pytest

from megatron_vcppo.config import RolloutConfig
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.stages.prompt_sampler import training_sampling, unequal_groups


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
