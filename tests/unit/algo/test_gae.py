"""Decoupled GAE against its oracle, its closed forms and its invariances."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.algo.advantages import bootstrap_of_unfinished
from megatron_vcppo.algo.gae import decoupled_gae, gae_reference
from megatron_vcppo.algo.masked import last_valid

rates = st.one_of(st.sampled_from([0.0, 0.95, 1.0]), st.floats(0.0, 1.0))


@st.composite
def cases(draw):
    """(rewards, values, mask, options): masked places hold NaN and infinities, which must not matter."""
    num_rows, num_tokens = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards, values = torch.randn(2, num_rows, num_tokens, generator=generator, dtype=torch.float64).unbind()
    density = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    mask = torch.rand(num_rows, num_tokens, generator=generator) < density
    rewards[~mask], values[~mask] = torch.nan, torch.inf
    options: dict[str, Any] = {"gamma": draw(rates), "lam_actor": draw(rates), "lam_critic": draw(rates)}
    if draw(st.booleans()):
        options["lam_actor"] = torch.rand(num_rows, generator=generator)
    if draw(st.booleans()):
        options["bootstrap_values"] = torch.randn(num_rows, generator=generator)
    return rewards, values, mask, options


@settings(max_examples=150, deadline=None)
@given(cases())
def test_kernel_is_the_oracle_rounded_once(case):
    rewards, values, mask, options = case
    rewards, values = rewards.float(), values.float()
    for got, exact in zip(
        decoupled_gae(rewards=rewards, values=values, mask=mask, **options),
        gae_reference(rewards=rewards, values=values, mask=mask, **options),
    ):
        assert got.dtype == torch.float32
        # Half a unit in the last place; the absolute term is float64's own rounding after cancellation.
        torch.testing.assert_close(got.double(), exact, rtol=2.0**-24, atol=1e-12)
        assert (got[~mask] == 0).all()


@settings(max_examples=50, deadline=None)
@given(cases())
def test_gaps_are_skipped(case):
    """A row with gaps gives what its valid tokens give when they stand side by side."""
    rewards, values, mask, options = case
    outputs = decoupled_gae(rewards=rewards, values=values, mask=mask, **options)
    for row in range(len(rewards)):
        chosen = mask[row]
        alone: dict[str, Any] = {
            name: x[row : row + 1] if isinstance(x, torch.Tensor) else x for name, x in options.items()
        }
        compact = decoupled_gae(
            rewards=rewards[row, chosen][None],
            values=values[row, chosen][None],
            mask=torch.ones(1, int(chosen.sum()), dtype=torch.bool),
            **alone,
        )
        for output, expected in zip(outputs, compact):
            assert torch.equal(output[row, chosen], expected[0])


@settings(max_examples=50, deadline=None)
@given(cases())
def test_decoupling_leaves_each_lambda_alone(case):
    """Advantages do not see λ_critic, returns do not see λ_actor; with equal λ returns = advantages + values."""
    rewards, values, mask, options = case
    advantages, returns = decoupled_gae(rewards=rewards, values=values, mask=mask, **options)
    other = decoupled_gae(rewards=rewards, values=values, mask=mask, **{**options, "lam_critic": 0.37})
    assert torch.equal(advantages, other[0])
    other = decoupled_gae(rewards=rewards, values=values, mask=mask, **{**options, "lam_actor": 0.37})
    assert torch.equal(returns, other[1])
    same = decoupled_gae(rewards=rewards, values=values, mask=mask, **{**options, "lam_critic": options["lam_actor"]})
    torch.testing.assert_close(same[1][mask], (same[0] + values)[mask])


def _dense(num_rows: int, num_tokens: int):
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, num_rows, num_tokens, generator=generator, dtype=torch.float64).unbind()
    return rewards, values, torch.ones(num_rows, num_tokens, dtype=torch.bool)


def test_lambda_one_is_the_monte_carlo_return():
    rewards, values, mask = _dense(3, 50)
    advantages, returns = decoupled_gae(
        rewards=rewards, values=values, mask=mask, gamma=1.0, lam_actor=1.0, lam_critic=1.0
    )
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - values)


def test_lambda_zero_is_the_td_error():
    rewards, values, mask = _dense(3, 50)
    advantages, returns = decoupled_gae(
        rewards=rewards, values=values, mask=mask, gamma=0.9, lam_actor=0.0, lam_critic=0.0
    )
    next_values = torch.cat((values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)), dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values - values)
    torch.testing.assert_close(returns, rewards + 0.9 * next_values)


def test_terminal_reward_decays_with_lambda():
    """Without values, the reward at the end reaches token t as λ^(T - t): the paper's §3.3."""
    num_tokens = 400
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    rewards = last_valid(mask).float()
    advantages, returns = decoupled_gae(
        rewards=rewards, values=torch.zeros_like(rewards), mask=mask, gamma=1.0, lam_actor=0.95, lam_critic=1.0
    )
    expected = 0.95 ** torch.arange(num_tokens - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(advantages[0].double(), expected, rtol=1e-6, atol=0.0)
    assert (returns == 1).all()


def test_extended_gae_by_hand():
    """γ 1, λ 0.5: a finished response, and an unfinished one with V(s_3) = V(s_2), whose last error is 0."""
    values, mask = torch.tensor([[0.25, 0.5, 0.75], [0.25, 0.5, 0.75]]), torch.ones(2, 3, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    bootstrap_values = bootstrap_of_unfinished(values, mask, torch.tensor([False, True]))
    assert bootstrap_values.tolist() == [0.0, 0.75]
    advantages, returns = decoupled_gae(
        rewards=rewards, values=values, mask=mask, gamma=1.0, lam_actor=0.5, lam_critic=1.0,
        bootstrap_values=bootstrap_values,
    )  # fmt: skip
    # Errors: 0.25, 0.25 and 1 - 0.75; then 0.25, 0.25 and 0.75 - 0.75.
    assert advantages.tolist() == [[0.25 + 0.125 + 0.0625, 0.25 + 0.125, 0.25], [0.25 + 0.125, 0.25, 0.0]]
    assert returns.tolist() == [[1.0, 1.0, 1.0], [0.75, 0.75, 0.75]]


def test_the_bootstrap_value_is_that_of_the_last_valid_token():
    values = torch.tensor([[1.0, 2.0, torch.nan], [3.0, torch.nan, 4.0], [torch.nan, torch.nan, torch.nan]])
    found = bootstrap_of_unfinished(values, ~values.isnan(), torch.tensor([True, True, True]))
    assert found.tolist() == [2.0, 4.0, 0.0]


def test_long_rows_cross_blocks():
    """Rows of several kernel blocks, blocks without any valid token among them, against the oracle."""
    rewards, values, mask = _dense(3, 1100)
    mask[0, 200:900], mask[1, ::3], mask[2, :257] = False, False, False
    options: dict[str, Any] = {"gamma": 0.999, "lam_actor": 0.95, "lam_critic": 1.0}
    for got, exact in zip(
        decoupled_gae(rewards=rewards, values=values, mask=mask, **options),
        gae_reference(rewards=rewards, values=values, mask=mask, **options),
    ):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_threads_do_not_change_the_result():
    rewards, values, mask = _dense(27, 30000)
    mask[:, 5000:9000] = False
    options: dict[str, Any] = {"gamma": 1.0, "lam_actor": torch.linspace(0.9, 1.0, 27), "lam_critic": 1.0}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = decoupled_gae(rewards=rewards, values=values, mask=mask, **options)
        torch.set_num_threads(3)
        three = decoupled_gae(rewards=rewards, values=values, mask=mask, **options)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, three):
        assert torch.equal(a, b)


def test_input_kinds():
    rewards, values, mask = _dense(4, 33)
    options: dict[str, Any] = {"gamma": 1.0, "lam_actor": 0.95, "lam_critic": 1.0}
    expected = decoupled_gae(rewards=rewards, values=values, mask=mask, **options)
    strided: dict[str, Any] = {
        name: torch.stack((x, x), dim=2)[:, :, 1] for name, x in (("rewards", rewards), ("values", values))
    }
    for a, b in zip(decoupled_gae(**strided, mask=mask, **options), expected):
        assert torch.equal(a, b)
    advantages, returns = decoupled_gae(
        rewards=rewards.bfloat16(), values=values.requires_grad_(), mask=mask, **options
    )
    assert advantages.dtype == torch.float64 and not returns.requires_grad
    half = decoupled_gae(rewards=rewards.bfloat16(), values=values.detach().bfloat16(), mask=mask, **options)
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0].double(), expected[0], rtol=0.05, atol=0.3)


def test_wrong_shapes_are_named():
    rewards, values, mask = _dense(2, 5)
    options: dict[str, Any] = {"gamma": 1.0, "lam_actor": 0.95, "lam_critic": 1.0}
    with pytest.raises(AssertionError, match=r"values \(2, 4\)"):
        decoupled_gae(rewards=rewards, values=values[:, :4], mask=mask, **options)
    with pytest.raises(AssertionError, match="int64, not bool"):
        decoupled_gae(rewards=rewards, values=values, mask=mask.long(), **options)
    with pytest.raises(AssertionError, match=r"\[B\], not \(3,\)"):
        decoupled_gae(rewards=rewards, values=values, mask=mask, **{**options, "lam_actor": torch.ones(3)})


@pytest.mark.gpu
def test_cuda_is_the_oracle():
    rewards, values, mask = _dense(3, 1100)
    mask[0, 200:900], mask[1, ::3] = False, False
    options: dict[str, Any] = {"gamma": 0.999, "lam_actor": 0.95, "lam_critic": 1.0}
    options["bootstrap_values"] = torch.tensor([0.0, 0.5, -2.0])
    got = decoupled_gae(rewards=rewards.cuda(), values=values.cuda(), mask=mask.cuda(), **options)
    for a, b in zip(got, gae_reference(rewards=rewards, values=values, mask=mask, **options)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)
