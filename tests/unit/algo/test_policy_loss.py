"""The policy loss: gradients, clip boundaries by hand, every split of the batch, packed against padded."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.algo import metrics as m
from megatron_vcppo.algo.losses.aggregation import AGGREGATIONS, loss_denominator, token_weights
from megatron_vcppo.algo.losses.policy import dis_loss, entropy_bonus, kl_loss, policy_loss, positive_lm_loss
from megatron_vcppo.algo.masked import check_finite

CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}


def _batch(seed: int = 0, num_rows: int = 4, num_tokens: int = 12):
    """logprobs, old, rollout log-probs, advantages (float64) and mask, with garbage where masked."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, num_rows, num_tokens, generator=generator, dtype=torch.float64)
    old = -noise[0].abs() - 0.1
    batch = [old + 0.3 * noise[1], old, old + 0.1 * noise[2], noise[3]]
    mask = torch.rand(num_rows, num_tokens, generator=generator) < 0.7
    mask[0, 0] = True
    for tensor in batch[1:]:
        tensor[~mask] = torch.nan
    batch[0][~mask] = -torch.inf
    return *batch, mask


def _single(ratio: float, advantage: float, **options: float | None) -> tuple[float, float, dict[str, float]]:
    """Loss, its derivative by the log-probability, and metric means of one token."""
    old = torch.tensor([-1.0], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    mask = torch.ones(1, dtype=torch.bool)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=old,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        mask=mask,
        denominator=1,
        **{**CLIPS, **options},
    )
    loss.backward()
    assert logprobs.grad is not None
    return float(loss.detach()), float(logprobs.grad), {name: float(x) for name, x in m.means(metrics).items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),  # on-policy: the policy gradient itself
        (1.27, 2.0, -2.54, -2.54, 0.0),  # inside
        (1.29, 2.0, -2.56, 0.0, 1.0),  # above 1 + clip_high: flat
        (0.5, 2.0, -1.0, -1.0, 0.0),  # a good token that lost probability is pulled back
        (0.81, -2.0, 1.62, 1.62, 0.0),
        (0.79, -2.0, 1.6, 0.0, 1.0),  # below 1 - clip_low: flat
        (3.0, -2.0, 6.0, 6.0, 0.0),  # a bad token that gained probability is pushed back
    ],
)
def test_clip_boundaries_by_hand(ratio, advantage, loss, gradient, clipped):
    got_loss, got_gradient, metrics = _single(ratio, advantage)
    assert got_loss == pytest.approx(loss)
    assert got_gradient == pytest.approx(gradient)
    assert metrics["clip_fraction"] == clipped
    assert metrics["ratio"] == pytest.approx(ratio)
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    assert _single(3.5, -2.0, dual_clip=3.0)[:2] == pytest.approx((6.0, 0.0))
    assert _single(2.5, -2.0, dual_clip=3.0)[:2] == pytest.approx((5.0, 5.0))
    assert _single(3.5, -2.0, dual_clip=3.0)[2]["dual_clip_fraction"] == 1.0
    assert _single(0.5, 2.0, dual_clip=3.0)[:2] == pytest.approx((-1.0, -1.0)), "good tokens are not touched"


def test_ratios_far_away_stay_finite():
    old = torch.tensor([-200.0, -1.0])
    logprobs = torch.tensor([-1.0, -200.0], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=old,
        advantages=-torch.ones(2),
        mask=torch.ones(2, dtype=torch.bool),
        denominator=2,
        **CLIPS,
    )
    loss.backward()
    assert loss.isfinite() and logprobs.grad is not None and logprobs.grad.isfinite().all()
    assert all(x.isfinite() for x in m.means(metrics).values())


@pytest.mark.parametrize("options", [{}, {"dual_clip": 3.0}, {"tis_cap": 1.05}])
def test_gradcheck(options):
    logprobs, old, rollout, advantages, mask = _batch()
    logprobs = logprobs.masked_fill(~mask, -1.0).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            x,
            old_logprobs=old,
            advantages=advantages,
            mask=mask,
            denominator=7,
            weights=token_weights(mask, "sequence"),
            rollout_logprobs=rollout,
            **CLIPS,
            **options,
        )[0]

    assert torch.autograd.gradcheck(loss, logprobs)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (3.9, 2.0, -7.8, -7.8, 0, 0),
        (4.1, 2.0, 0.0, 0.0, 0, 1),
        (4.1, -2.0, 0.0, 0.0, 0, 1),  # the clipped surrogate pushes such a bad token back
        (0.19, 2.0, 0.0, 0.0, 1, 0),  # and pulls such a good one
        (0.19, -2.0, 0.0, 0.0, 1, 0),
        (0.21, -2.0, 0.42, 0.42, 0, 0),
    ],
)
def test_double_sided_importance_sampling_by_hand(ratio, advantage, loss, gradient, low, high):
    """d(-A π/π_rollout) / d log π = -A π/π_rollout, inside [0.2, 4] only."""
    rollout = torch.tensor([-1.5, -0.5], dtype=torch.float64)
    logprobs = (rollout + math.log(ratio)).requires_grad_()
    got, metrics = dis_loss(
        logprobs,
        rollout_logprobs=rollout,
        advantages=torch.tensor([advantage, 100.0], dtype=torch.float64),
        mask=torch.tensor([True, False]),
        denominator=1,
        clip_low=0.8,
        clip_high=3.0,
    )
    got.backward()
    assert got.item() == pytest.approx(loss)
    torch.testing.assert_close(logprobs.grad, torch.tensor([gradient, 0.0], dtype=torch.float64))
    means = {name: float(x) for name, x in m.means(metrics).items()}
    assert (means["dis_masked_low"], means["dis_masked_high"]) == (low, high)


def test_truncated_importance_sampling_by_hand():
    old = torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64)).requires_grad_()
    rollout = torch.log(torch.tensor([0.4, 0.1], dtype=torch.float64))
    logprobs = old.detach().clone().requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        old_logprobs=old,
        advantages=torch.ones(2, dtype=torch.float64),
        mask=torch.ones(2, dtype=torch.bool),
        denominator=2,
        rollout_logprobs=rollout,
        tis_cap=2.0,
        **CLIPS,
    )
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([1.25, 2.0], dtype=torch.float64) / 2)
    means = {name: float(x) for name, x in m.means(metrics).items()}
    assert means["tis_weight"] == pytest.approx(1.625) and means["tis_capped"] == 0.5
    assert means["logprob_gap"] == pytest.approx((math.log(1.25) + math.log(5)) / 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(AGGREGATIONS), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_every_split_gives_the_same_loss_gradients_and_metrics(seed, aggregation, assignment):
    """Rows dealt out to micro-batches, each packed flat without its padding, against the padded batch at once."""
    logprobs, old, rollout, advantages, mask = _batch(seed)
    weights = token_weights(mask, aggregation)
    denominator = loss_denominator(aggregation, int(mask.sum()), int(mask.any(1).sum()), 16)
    options: dict[str, Any] = {"denominator": denominator, "tis_cap": 2.0, "dual_clip": 3.0, **CLIPS}

    whole = logprobs.clone().requires_grad_()
    loss, metrics = policy_loss(
        whole,
        old_logprobs=old,
        advantages=advantages,
        mask=mask,
        weights=weights,
        rollout_logprobs=rollout,
        **options,
    )
    loss.backward()

    split = logprobs.clone().requires_grad_()
    parts = []
    for part in set(assignment):
        rows = torch.tensor([row for row in range(4) if assignment[row] == part])

        def packed(x: torch.Tensor, rows: torch.Tensor = rows) -> torch.Tensor:
            return x[rows].flatten()

        part_loss, part_metrics = policy_loss(
            packed(split),
            old_logprobs=packed(old),
            advantages=packed(advantages),
            mask=packed(mask),
            weights=packed(weights),
            rollout_logprobs=packed(rollout),
            **options,
        )
        part_loss.backward()
        parts.append(part_metrics)
    assert whole.grad is not None
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-12, atol=1e-15)
    assert (whole.grad[~mask] == 0).all(), "garbage on masked tokens must not reach gradients"
    together, expected = m.means(m.add(parts)), m.means(metrics)
    assert together.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(together[name], expected[name], rtol=1e-12, atol=1e-15)


def test_aggregations_by_hand():
    """Rows of 1 and 3 tokens with losses 4 and 1, 1, 1, and a row that was filtered out."""
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    advantages = -torch.tensor([[4.0, 9.0, 9.0], [1.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    zeros = torch.zeros_like(advantages)
    expected = {"token": 7 / 4, "sequence": 5 / 2, "constant_length": 7 / (2 * 10)}
    for aggregation in AGGREGATIONS:
        loss, _ = policy_loss(
            zeros,
            old_logprobs=zeros,
            advantages=advantages,
            mask=mask,
            weights=token_weights(mask, aggregation),
            denominator=loss_denominator(aggregation, 4, 2, 10),
            **CLIPS,
        )
        assert float(loss) == pytest.approx(expected[aggregation])


def test_bad_numbers_are_named_and_counted():
    logprobs, old, _, advantages, mask = _batch()
    first, second = mask.nonzero()[:2].tolist()
    advantages[tuple(first)], old[tuple(first)], old[tuple(second)] = torch.nan, torch.inf, torch.nan
    with pytest.raises(FloatingPointError, match=r"old: 1 NaN, 1 inf; advantages: 1 NaN, 0 inf$"):
        check_finite(mask, logprobs=logprobs, old=old, missing=None, advantages=advantages)
    loss, _ = policy_loss(logprobs, old_logprobs=old, advantages=advantages, mask=mask, denominator=1, **CLIPS)
    assert not loss.isfinite()


def test_terms_by_hand_and_gradcheck():
    logprobs, old, _, _, mask = _batch()
    count = int(mask.sum())
    logprobs = logprobs.masked_fill(~mask, -1.0).requires_grad_()
    chosen, ref = logprobs[mask], old[mask]
    loss, metrics = entropy_bonus(-logprobs, mask, coef=0.01, denominator=count)
    torch.testing.assert_close(loss, 0.01 * chosen.mean())
    torch.testing.assert_close(m.means(metrics)["entropy"], -chosen.mean().detach())
    assert not entropy_bonus(-logprobs, mask, coef=0.0, denominator=count)[0].requires_grad

    loss, metrics = kl_loss(logprobs, ref_logprobs=old, mask=mask, coef=0.5, kind="k2", denominator=count)
    torch.testing.assert_close(loss, 0.25 * (chosen - ref).square().mean())
    torch.testing.assert_close(m.means(metrics)["kl_ref"], 2 * loss.detach())

    positive = mask.clone()
    positive[1:] = False
    loss, metrics = positive_lm_loss(logprobs, positive, coef=0.1, denominator=int(positive.sum()))
    torch.testing.assert_close(loss, -0.1 * logprobs[positive].mean())
    nothing = torch.zeros_like(mask)
    loss, metrics = positive_lm_loss(logprobs, nothing, coef=0.1, denominator=0)
    loss.backward()
    assert float(loss.detach()) == 0 and float(m.means(metrics)["positive_nll"]) == 0 and (logprobs.grad == 0).all()
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(
            lambda x, kind=kind: kl_loss(x, ref_logprobs=old, mask=mask, coef=0.5, kind=kind, denominator=9)[0],
            logprobs,
        )
    assert torch.autograd.gradcheck(lambda x: positive_lm_loss(x, mask, coef=0.1, denominator=9)[0], logprobs)


def test_a_zero_denominator_with_valid_tokens_is_a_bug():
    with pytest.raises(AssertionError, match="denominator is 0"):
        positive_lm_loss(torch.zeros(2), torch.ones(2, dtype=torch.bool), coef=0.1, denominator=0)
