"""Seeds of responses, and warnings about sampling that biases training."""

import pytest

from megatron_vcppo.config.rollout import RolloutConfig
from megatron_vcppo.rollout.seeds import sample_seed, training_sampling


def test_seeds_are_the_same_in_every_process_and_differ_in_every_part() -> None:
    assert sample_seed(0, 1, "chain/17", 2) == 413058873
    parts = [(0, 1, "a", 2), (1, 1, "a", 2), (0, 2, "a", 2), (0, 1, "b", 2), (0, 1, "a", 3), (0, 12, "a", 2)]
    seeds = [sample_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    many = [sample_seed(3, i, f"p{p}", s) for i in range(10) for p in range(40) for s in range(5)]
    assert all(0 <= seed < 2**31 for seed in many) and len(set(many)) == len(many)


def test_cutting_the_distribution_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    training_sampling(RolloutConfig(top_p=0.9, top_k=20))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("rollout.top_p = 0.9 and rollout.top_k = 20: responses are drawn from the cut")


def test_plain_sampling_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    assert training_sampling(RolloutConfig(temperature=0.7, stop=["END"])).stop == ["END"]
    assert not training_sampling(RolloutConfig()).ignore_eos
    assert training_sampling(RolloutConfig(ignore_eos=True)).ignore_eos
    assert not caplog.records
