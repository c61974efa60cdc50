"""A reward model's scores as rewards, and the numbers that show reward hacking, against hand-made ones and numpy."""

import math

import numpy as np
import pytest
import torch

from megatron_vcppo.algo.metrics import add
from megatron_vcppo.algo.model_rewards import (
    RunningMoments,
    model_reward_metrics,
    model_rewards,
    summarize_model_rewards,
)


def test_running_moments_are_those_of_all_numbers() -> None:
    generator = np.random.default_rng(0)
    batches = [generator.normal(1000.0, 0.5, size) for size in (1, 7, 64)]
    moments = RunningMoments()
    for batch in batches:
        moments = moments.add(torch.from_numpy(batch))
    everything = np.concatenate(batches)
    assert moments.count == 72
    assert moments.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert moments.std == pytest.approx(everything.std(), abs=1e-9)
    assert RunningMoments().add(torch.full((4,), 0.1)).std == 1.0, "equal scores must not be divided by rounding"


def test_scores_are_normalized_then_clipped() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert model_rewards(scores, None, None).tolist() == [1, 2, 3, 10]
    assert model_rewards(scores, None, 2.5).tolist() == [1, 2, 2.5, 2.5]
    moments = RunningMoments().add(scores)  # mean 4, variance 12.5
    expected = [-3 / math.sqrt(12.5), -2 / math.sqrt(12.5), -1 / math.sqrt(12.5), 1.0]
    assert model_rewards(scores, moments, 1.0).tolist() == pytest.approx(expected)


def metrics_of(scores: list[float], verdicts: list[float], lengths: list[int], clip: float | None = None):
    x = torch.tensor(scores, dtype=torch.float64)
    return model_reward_metrics(
        scores=x,
        rewards=model_rewards(x, None, clip),
        clip=clip,
        verdicts=torch.tensor(verdicts),
        is_correct=torch.tensor(verdicts) > 0,
        lengths=torch.tensor(lengths),
    )


def test_what_the_model_likes_is_compared_with_verdict_and_length() -> None:
    scores, verdicts, lengths = [3.0, 1.0, 2.0, 4.0], [1.0, -1.0, 1.0, -1.0], [10, 20, 30, 40]
    whole = metrics_of(scores, verdicts, lengths, clip=3.0)
    parts = [
        metrics_of(scores[:1], verdicts[:1], lengths[:1], clip=3.0),
        metrics_of(scores[1:], verdicts[1:], lengths[1:], clip=3.0),
    ]
    for metrics in (whole, add(parts)):
        found = summarize_model_rewards(metrics)
        assert found == {
            "model_reward/score_mean": pytest.approx(2.5),
            "model_reward/score_std": pytest.approx(math.sqrt(1.25)),
            "model_reward/clipped_share": pytest.approx(0.5),
            "model_reward/score_right": pytest.approx(2.5),
            "model_reward/score_wrong": pytest.approx(2.5),
            "model_reward/verifier_correlation": pytest.approx(0.0, abs=1e-12),
            "model_reward/length_correlation": pytest.approx(0.4),  # 10 · 2 / √(5 · 500)
        }


def test_a_hacked_model_prefers_wrong_and_long_responses() -> None:
    found = summarize_model_rewards(metrics_of([1.0, 2.0, 3.0], [1.0, -1.0, -1.0], [5, 10, 15]))
    assert found["model_reward/score_right"] == 1.0 and found["model_reward/score_wrong"] == 2.5
    assert found["model_reward/verifier_correlation"] == pytest.approx(-math.sqrt(3) / 2)
    assert found["model_reward/length_correlation"] == pytest.approx(1.0)
    assert found["model_reward/clipped_share"] == 0.0


def test_what_does_not_exist_is_missing() -> None:
    found = summarize_model_rewards(metrics_of([1.0, 2.0], [0.0, 0.0], [5, 5]))
    assert found.keys() == {
        f"model_reward/{name}" for name in ("score_mean", "score_std", "clipped_share", "score_wrong")
    }
