"""From a reward model's scores to rewards, and whether what it rewards is still what the verifier wants."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vcppo.algo.metrics import Metrics, mean_metric, means, moment_metrics, standard_deviation, total_metric
from megatron_vcppo.algo.position_profiles import trend, trend_metrics


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of all numbers so far, by Chan's update, which loses no digits to a large mean."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    def add(self, x: Tensor) -> "RunningMoments":
        """With the numbers of one more batch, x [N], N > 0; summed in float64."""
        x = x.double()
        count, mean = float(len(x)), float(x.mean())
        squares, delta, total = float((x - mean).square().sum()), mean - self.mean, self.count + count
        return RunningMoments(
            total,
            self.mean + delta * count / total,
            self.squares + squares + delta**2 * self.count * count / total,
        )

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where the numbers differ by rounding only, so that it can divide."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > 1e-6 * max(1.0, abs(self.mean)) else 1.0


def model_rewards(scores: Tensor, moments: RunningMoments | None, clip: float | None) -> Tensor:
    """float64 [B] from scores [B]: (score - mean) / std if there are moments, then bounded to [-clip, clip]."""
    rewards = scores.double()
    if moments is not None:
        rewards = (rewards - moments.mean) / moments.std
    return rewards if clip is None else rewards.clamp(-clip, clip)


def model_reward_metrics(
    *, scores: Tensor, rewards: Tensor, clip: float | None, verdicts: Tensor, is_correct: Tensor, lengths: Tensor
) -> Metrics:
    """What ``summarize_model_rewards`` needs of one share of the rollouts; add the shares up first.

    Args:
        scores: [B], the model's, as it gave them.
        rewards: [B], of the model: normalized and clipped.
        clip: their bound.
        verdicts: [B], the verifier's rewards.
        is_correct: bool [B].
        lengths: [B], response tokens.
    """
    everything = torch.ones_like(is_correct)
    outside = torch.zeros_like(is_correct) if clip is None else rewards.abs() >= clip
    return {
        **moment_metrics("scores", scores, everything),
        "clipped": mean_metric(outside, everything),
        "right": mean_metric(scores, is_correct),
        "wrong": mean_metric(scores, ~is_correct),
        "num_right": total_metric(is_correct.sum()),
        "num_wrong": total_metric((~is_correct).sum()),
        **trend_metrics("verifier", scores, verdicts, everything),
        **trend_metrics("length", scores, lengths, everything),
    }


def summarize_model_rewards(metrics: Metrics) -> dict[str, float]:
    """Named numbers from the metrics of all rollouts; a mean or correlation that does not exist is missing.

    The scores' mean and spread, their means over right and wrong responses, and their correlations (Pearson) with the
    verifier's rewards and with the length of the response.
    """
    values = {name: float(mean) for name, mean in means(metrics).items()}
    found = {
        "model_reward/score_mean": values["scores"],
        "model_reward/score_std": standard_deviation(values, "scores"),
        "model_reward/clipped_share": values["clipped"],
    }
    for kind in ("right", "wrong"):
        if values[f"num_{kind}"]:
            found[f"model_reward/score_{kind}"] = values[kind]
    for name in ("verifier", "length"):
        if _varies(values, name):
            found[f"model_reward/{name}_correlation"] = trend(values, name)[1]
    return found


def _varies(values: Mapping[str, float], name: str) -> bool:
    return all(standard_deviation(values, f"{name}_{part}") > 0 for part in ("x", "position"))
