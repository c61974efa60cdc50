"""The health of critic and advantages in a batch before the update: the numbers that ``diagnose`` reads.

``batch_diagnostics`` gives metrics that add up over ranks; ``summarize`` turns the sum into named numbers and profiles.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_vcppo.algo.masked import valid_index
from megatron_vcppo.algo.metrics import (
    Metrics,
    explained_variance,
    mean_metric,
    means,
    moment_metrics,
    standard_deviation,
    total_metric,
)
from megatron_vcppo.algo.position_profiles import (
    decile_profile,
    position_profile,
    relative_position,
    terminal_share,
    trend,
    trend_metrics,
)

_EARLY_LATE_DECILES = 2
_PROFILES = ("advantage_by_position", "advantage_by_decile", "value_by_position", "value_by_decile")


@torch.no_grad()
def batch_diagnostics(
    *,
    values: Tensor,
    returns: Tensor,
    advantages: Tensor,
    mask: Tensor,
    decay_actor: float | Tensor,
    decay_critic: float | Tensor,
    bin_width: int,
    num_bins: int,
    give_up_mask: Tensor | None = None,
    mc_returns: Tensor | None = None,
) -> Metrics:
    """Metrics of one rank's rollouts; every rank passes the same options. Add them up, then ``summarize``.

    Args:
        values: [B, T], the critic's.
        returns: [B, T], the critic's targets.
        advantages: [B, T], before whitening.
        mask: bool [B, T].
        decay_actor: γ λ_actor, a number or [B].
        decay_critic: γ λ_critic, a number or [B].
        bin_width: tokens per bin of the absolute profiles.
        num_bins: of the absolute profiles; the last one also takes every later token.
        give_up_mask: bool [B, T], tokens with which the actor ends its thinking before it is done. Their advantage is
            what an actor with a misaligned critic follows into collapse, so it separates failing runs from sound ones
            earlier than any correlation does. Default: no such token is known.
        mc_returns: [B, T], the discounted sums of the rewards: how far off the values are from what came, which critics
            with different targets can be compared by. Default: the targets are that (λ_critic = 1).

    Returns (sum, weight) pairs, float64: profiles [bins], everything else 0-d.
    """
    first = mask & (valid_index(mask) == 0)
    mc_returns = returns if mc_returns is None else mc_returns
    metrics: Metrics = {
        **moment_metrics("values", values, mask),
        **moment_metrics("returns", returns, mask),
        **moment_metrics("value_errors", returns - values, mask),
        **moment_metrics("mc_returns", mc_returns, mask),
        **moment_metrics("mc_errors", mc_returns - values, mask),
        **moment_metrics("advantages", advantages, mask),
        **_trends("advantage", advantages, mask),
        **_trends("value", values, mask),
        "value_first_token": mean_metric(values, first),
        "advantage_first_token": mean_metric(advantages, first),
    }
    for name, x in (("advantage", advantages), ("value", values)):
        metrics[f"{name}_by_position"] = position_profile(x, mask, bin_width, num_bins)
        metrics[f"{name}_by_decile"] = decile_profile(x, mask)
    for name, decay in (("actor", decay_actor), ("critic", decay_critic)):
        share = terminal_share(mask, decay)
        metrics[f"{name}_terminal_share"] = mean_metric(share, mask)
        metrics[f"{name}_terminal_share_first_token"] = mean_metric(share, first)
    if give_up_mask is not None:
        metrics["give_up_advantage"] = mean_metric(advantages, give_up_mask & mask)
        metrics["give_up_tokens"] = total_metric((give_up_mask & mask).sum())
    return metrics


def summarize(metrics: Metrics) -> tuple[dict[str, float], dict[str, list[float | None]]]:
    """(named numbers, profiles) from the metrics of ``batch_diagnostics``, summed over all ranks.

    Profiles: name -> mean per bin, None in bins without tokens. advantage_early_late_gap: mean advantage of the first
    two relative deciles minus that of the last two. give_up_advantage_sigma: in standard deviations above the mean
    advantage; both give-up numbers are missing for a batch in which no response gave up.
    """
    profiles = {name: _profile(*metrics[name]) for name in _PROFILES}
    values = {name: float(mean) for name, mean in means(_without(metrics, profiles)).items()}
    sums, counts = metrics["advantage_by_decile"]
    early, late = (
        float(sums[part].sum() / counts[part].sum().clamp(min=1))
        for part in (slice(None, _EARLY_LATE_DECILES), slice(-_EARLY_LATE_DECILES, None))
    )
    advantage_std = standard_deviation(values, "advantages")
    mc_moments = {
        "returns": values["mc_returns"],
        "returns_squared": values["mc_returns_squared"],
        "value_errors": values["mc_errors"],
        "value_errors_squared": values["mc_errors_squared"],
    }
    numbers = {
        "critic/explained_variance": explained_variance(values),
        "critic/mc_explained_variance": explained_variance(mc_moments),
        "critic/mc_error": values["mc_errors_squared"],
        "critic/value_mean": values["values"],
        "critic/value_std": standard_deviation(values, "values"),
        "critic/value_first_token": values["value_first_token"],
        "critic/return_mean": values["returns"],
        "critic/terminal_share": values["critic_terminal_share"],
        "critic/terminal_share_first_token": values["critic_terminal_share_first_token"],
        "actor/terminal_share": values["actor_terminal_share"],
        "actor/terminal_share_first_token": values["actor_terminal_share_first_token"],
        "actor/advantage_mean": values["advantages"],
        "actor/advantage_std": advantage_std,
        "actor/advantage_first_token": values["advantage_first_token"],
        "actor/advantage_early_late_gap": early - late,
    }
    for name in ("actor/advantage", "critic/value"):
        for place in ("position", "relative"):
            slope, correlation = trend(values, f"{name.rpartition('/')[2]}_{place}")
            numbers |= {f"{name}_{place}_slope": slope, f"{name}_{place}_correlation": correlation}
    if values.get("give_up_tokens", 0) > 0:
        numbers["actor/give_up_tokens"] = values["give_up_tokens"]
        numbers["actor/give_up_advantage"] = values["give_up_advantage"]
        if advantage_std > 0:
            numbers["actor/give_up_advantage_sigma"] = (
                values["give_up_advantage"] - values["advantages"]
            ) / advantage_std
    return numbers, profiles


def length_statistics(lengths: Tensor, truncated: Tensor) -> dict[str, float]:
    """Mean, spread and quantiles of the response lengths of the whole batch (gather those of all ranks first).

    lengths: [N] response tokens; truncated: bool [N].
    """
    assert len(lengths), "there are no responses to take statistics of"
    lengths = lengths.double()
    low, median, high = torch.quantile(lengths, lengths.new_tensor([0.1, 0.5, 0.9])).tolist()
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_std": float(lengths.std(correction=0)),
        "rollout/length_min": float(lengths.min()),
        "rollout/length_p10": low,
        "rollout/length_median": median,
        "rollout/length_p90": high,
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_share": float(truncated.double().mean()),
    }


def _trends(name: str, x: Tensor, mask: Tensor) -> Metrics:
    """Of x over absolute places (tokens) and relative ones (0 to 1)."""
    return {
        **trend_metrics(f"{name}_position", x, valid_index(mask), mask),
        **trend_metrics(f"{name}_relative", x, relative_position(mask), mask),
    }


def _profile(sums: Tensor, counts: Tensor) -> list[float | None]:
    return [s / n if n else None for s, n in zip(sums.tolist(), counts.tolist(), strict=True)]


def _without(metrics: Metrics, names: Mapping[str, object]) -> Metrics:
    return {name: pair for name, pair in metrics.items() if name not in names}
