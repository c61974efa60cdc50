"""Profiles, trends and batch diagnostics: by hand, and the same for every split of the batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.algo import metrics as m
from megatron_vcppo.algo.diagnostics import batch_diagnostics, length_statistics, summarize
from megatron_vcppo.algo.position_profiles import (
    decile_profile,
    position_profile,
    relative_position,
    terminal_share,
    trend,
    trend_metrics,
)

OPTIONS: dict[str, Any] = {"decay_actor": 0.95, "decay_critic": 1.0, "bin_width": 4, "num_bins": 5}


def test_profiles_by_hand():
    mask = torch.tensor([[True, False, True, True, True], [True, True, False, False, False]])
    x = torch.tensor([[1.0, 99.0, 2.0, 3.0, 4.0], [10.0, 20.0, 99.0, 99.0, 99.0]])
    sums, counts = position_profile(x, mask, bin_width=2, num_bins=2)
    assert sums.tolist() == [33.0, 7.0] and counts.tolist() == [4.0, 2.0]
    sums, counts = position_profile(x, mask, bin_width=1, num_bins=2)
    assert sums.tolist() == [11.0, 29.0], "the last bin takes the rest"
    sums, counts = decile_profile(x, mask)
    assert sums.tolist() == [11.0, 0, 2.0, 0, 0, 23.0, 0, 4.0, 0, 0]
    assert counts.tolist() == [2.0, 0, 1.0, 0, 0, 2.0, 0, 1.0, 0, 0]
    torch.testing.assert_close(relative_position(mask)[0, mask[0]], torch.tensor([0.125, 0.375, 0.625, 0.875]))


def test_terminal_share_is_what_gae_lets_through():
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    expected = torch.tensor([[0.81, 0.9, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(terminal_share(mask, 0.9), expected)
    by_row = terminal_share(mask, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(by_row, mask.double())


def test_trend_is_the_least_squares_line():
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(40.0).expand(3, 40)
    x = 2.0 - 0.25 * positions + torch.randn(3, 40, generator=generator)
    mask = torch.rand(3, 40, generator=generator) < 0.8
    values = {name: float(mean) for name, mean in m.means(trend_metrics("a", x, positions, mask)).items()}
    slope, correlation = trend(values, "a")
    stacked = torch.stack((x[mask], positions[mask])).double()
    assert correlation == pytest.approx(float(torch.corrcoef(stacked)[0, 1]))
    covariance = torch.cov(stacked)
    assert slope == pytest.approx(float(covariance[0, 1] / covariance[1, 1]))
    flat = {name: float(mean) for name, mean in m.means(trend_metrics("a", x * 0, positions, mask)).items()}
    assert trend(flat, "a") == (0.0, 0.0)


def _batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    values, returns, advantages = torch.randn(3, 6, 30, generator=generator).unbind()
    mask = torch.arange(30) < torch.randint(2, 31, (6, 1), generator=generator)
    give_up = torch.rand(6, 30, generator=generator) < 0.1
    return {"values": values, "returns": returns, "advantages": advantages, "mask": mask, "give_up_mask": give_up}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_every_split_gives_the_same_summary(seed, cut):
    batch = _batch(seed)
    whole = batch_diagnostics(**batch, **OPTIONS)
    parts = [
        batch_diagnostics(**{name: x[rows] for name, x in batch.items()}, **OPTIONS)
        for rows in (slice(None, cut), slice(cut, None))
    ]
    numbers, profiles = summarize(m.add(parts))
    expected_numbers, expected_profiles = summarize(whole)
    assert numbers == pytest.approx(expected_numbers, rel=1e-9, abs=1e-9)
    assert profiles.keys() == expected_profiles.keys()
    for name in profiles:
        assert profiles[name] == [x if x is None else pytest.approx(x) for x in expected_profiles[name]]


def test_summary_by_definition():
    batch = _batch()
    values, returns, advantages, mask, give_up = batch.values()
    numbers, profiles = summarize(batch_diagnostics(**batch, **OPTIONS))
    a = advantages[mask].double()
    assert numbers["actor/advantage_std"] == pytest.approx(float(a.std(correction=0)))
    assert numbers["critic/value_first_token"] == pytest.approx(float(values[:, 0].mean()))
    errors = (returns - values)[mask].double()
    expected = 1 - errors.var(correction=0) / returns[mask].double().var(correction=0)
    assert numbers["critic/explained_variance"] == pytest.approx(float(expected))
    lengths = mask.sum(1)
    assert numbers["actor/terminal_share_first_token"] == pytest.approx(float((0.95 ** (lengths - 1.0)).mean()))
    assert numbers["critic/terminal_share_first_token"] == 1.0
    chosen = advantages[give_up & mask].double()
    assert numbers["actor/give_up_tokens"] == len(chosen)
    sigma = (chosen.mean() - a.mean()) / a.std(correction=0)
    assert numbers["actor/give_up_advantage_sigma"] == pytest.approx(float(sigma))
    assert len(profiles["advantage_by_position"]) == 5 and len(profiles["value_by_decile"]) == 10


def test_values_are_compared_with_what_came_whatever_the_targets_were():
    mask = torch.tensor([[True, True], [True, True]])
    values = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    mc_returns = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    options = {"values": values, "advantages": values, "mask": mask, **OPTIONS}
    numbers, _ = summarize(batch_diagnostics(returns=values, mc_returns=mc_returns, **options))
    # Errors 1, 0.5, -1, -0.5: mean square 0.625, which is 62.5 % of the returns' variance, 1.
    assert numbers["critic/mc_error"] == pytest.approx(0.625)
    assert numbers["critic/mc_explained_variance"] == pytest.approx(0.375)
    assert numbers["critic/explained_variance"] == 1.0
    numbers, _ = summarize(batch_diagnostics(returns=mc_returns, **options))
    assert numbers["critic/mc_explained_variance"] == numbers["critic/explained_variance"] == pytest.approx(0.375)


def test_early_tokens_above_late_ones_show_as_a_gap():
    values = torch.zeros(2, 20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    advantages = torch.linspace(1.0, -1.0, 20).expand(2, 20)
    numbers, _ = summarize(
        batch_diagnostics(values=values, returns=values, advantages=advantages, mask=mask, **OPTIONS)
    )
    assert numbers["actor/advantage_early_late_gap"] == pytest.approx(float(advantages[0, :4].mean() * 2), rel=1e-5)
    assert numbers["actor/advantage_position_correlation"] == pytest.approx(-1.0)
    assert numbers["actor/advantage_position_slope"] == pytest.approx(-2 / 19, rel=1e-5)
    values = torch.linspace(0.0, 1.0, 20).expand(2, 20)
    numbers, _ = summarize(
        batch_diagnostics(values=values, returns=values, advantages=advantages, mask=mask, **OPTIONS)
    )
    assert numbers["critic/value_position_correlation"] == pytest.approx(1.0)
    assert numbers["critic/value_position_slope"] == pytest.approx(1 / 19, rel=1e-5)
    assert numbers["critic/value_relative_slope"] == pytest.approx(20 / 19, rel=1e-5)
    assert "actor/give_up_advantage" not in numbers, "nobody gave up: no number"


def test_length_statistics():
    lengths = torch.tensor([10, 20, 30, 40, 50])
    numbers = length_statistics(lengths, torch.tensor([False, False, False, False, True]))
    assert numbers["rollout/length_mean"] == 30 and numbers["rollout/length_median"] == 30
    assert numbers["rollout/length_min"] == 10 and numbers["rollout/length_max"] == 50
    assert numbers["rollout/length_p90"] == pytest.approx(46) and numbers["rollout/truncated_share"] == pytest.approx(
        0.2
    )


def test_metrics_of_different_names_do_not_add():
    batch = _batch()
    with_mask = batch_diagnostics(**batch, **OPTIONS)
    without = batch_diagnostics(**(batch | {"give_up_mask": None}), **OPTIONS)
    with pytest.raises(AssertionError, match="give_up"):
        m.add([with_mask, without])
