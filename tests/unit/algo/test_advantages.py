"""λ by length, group baselines, whitening over splits, the explained-variance gate."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.algo.advantages import (
    broadcast_to_tokens,
    gate_on_explained_variance,
    group_advantages,
    length_adaptive_lam,
    whiten,
)
from megatron_vcppo.algo.masked import masked_moments, mean_and_variance
from megatron_vcppo.errors import UserError


def test_length_adaptive_lam_has_vapos_values_and_is_clamped():
    lengths = torch.tensor([0, 1, 10, 20, 100, 1000, 4000])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.8, 0.98, 0.995], dtype=torch.float64)
    torch.testing.assert_close(length_adaptive_lam(lengths, 0.05), expected)


def test_grpo_and_rloo_by_hand():
    rewards = torch.tensor([1.0, 5.0, -1.0, 5.0, 1.0, 8.0])
    groups = torch.tensor([7, 3, 7, 3, 7, 3])  # rewards 1, -1, 1 and 5, 5, 8
    std_7, std_3 = (4 / 3) ** 0.5, 3.0**0.5
    grpo = torch.tensor([2 / 3, -1, -4 / 3, -1, 2 / 3, 2])
    expected = grpo / torch.tensor([std_7, std_3, std_7, std_3, std_7, std_3])
    torch.testing.assert_close(group_advantages(rewards, groups, "grpo"), expected)
    rloo = torch.tensor([1.0, -1.5, -2.0, -1.5, 1.0, 3.0])
    torch.testing.assert_close(group_advantages(rewards, groups, "rloo"), rloo)


def test_equal_rewards_teach_nothing():
    rewards = torch.full((4,), 0.1)
    for kind in ("grpo", "rloo"):
        advantages = group_advantages(rewards, torch.zeros(4, dtype=torch.long), kind)
        torch.testing.assert_close(advantages, torch.zeros(4), atol=1e-7, rtol=0.0)


def test_a_group_of_one_is_a_user_error():
    with pytest.raises(UserError, match="1 prompts have one sample"):
        group_advantages(torch.ones(3), torch.tensor([0, 0, 1]), "rloo")


def test_broadcast_fills_valid_tokens_only():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    expected = torch.tensor([[2.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    assert torch.equal(broadcast_to_tokens(torch.tensor([2.0, -1.0]), mask), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.lists(st.integers(0, 40), max_size=4))
def test_whitening_does_not_depend_on_the_split(seed, num_tokens, cuts):
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 + 5.0 * torch.randn(2, num_tokens, generator=generator)
    mask = torch.rand(2, num_tokens, generator=generator) < 0.8
    x[~mask] = torch.nan
    borders = sorted({0, num_tokens, *(c for c in cuts if c < num_tokens)})
    pieces = [slice(a, b) for a, b in itertools.pairwise(borders)]
    moments = sum((masked_moments(x[:, p], mask[:, p]) for p in pieces), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(moments, masked_moments(x, mask))
    whitened = torch.cat([whiten(x[:, p], mask[:, p], moments) for p in pieces], dim=1)
    assert (whitened[~mask] == 0).all()
    if mask.sum() >= 2:
        mean, variance = mean_and_variance(masked_moments(whitened, mask))
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0.0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0.0)


def test_whitening_does_not_blow_up_a_constant():
    constant = torch.full((1, 5), 0.1)
    everything = torch.ones(1, 5, dtype=torch.bool)
    moments = masked_moments(constant, everything)
    assert whiten(constant, everything, moments).abs().max() < 1e-6


def test_gate_falls_back_to_the_batch_mean():
    advantages, returns = torch.randn(2, 3), torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    gate = functools.partial(gate_on_explained_variance, advantages, returns=returns, mask=mask, mean_return=-0.2)
    assert gate(explained_variance=0.01) is advantages
    gated = gate(explained_variance=0.0)
    torch.testing.assert_close(gated, torch.tensor([[1.2, 1.2, 0.0], [-0.8, -0.8, -0.8]]))
