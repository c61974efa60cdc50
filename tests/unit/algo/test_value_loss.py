"""The critic's loss, bounded values, and the explained variance that comes out of its metrics."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.algo import metrics as m
from megatron_vcppo.algo.losses.value import bound_values, value_loss


def _batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    values, returns, noise = torch.randn(3, 3, 9, generator=generator, dtype=torch.float64).unbind()
    mask = torch.rand(3, 9, generator=generator) < 0.7
    mask[0, :2] = True
    returns[~mask] = torch.nan
    return values, returns, values + 0.3 * noise, mask


def _single(value: float, returned: float, **options: Any) -> tuple[float, float]:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([returned], dtype=torch.float64)
    loss, _ = value_loss(values, returns=target, mask=torch.ones(1, dtype=torch.bool), denominator=1, **options)
    loss.backward()
    assert values.grad is not None
    return float(loss.detach()), float(values.grad)


def test_squared_and_huber_by_hand():
    assert _single(1.0, 4.0) == pytest.approx((4.5, -3.0))
    assert _single(1.0, 4.0, huber_delta=2.0) == pytest.approx((4.0, -2.0))
    assert _single(1.0, 2.5, huber_delta=2.0) == pytest.approx((1.125, -1.5))
    assert _single(5.0, 2.0, huber_delta=2.0) == pytest.approx((4.0, 2.0))


def test_value_clipping_by_hand():
    clip = {"value_clip": 0.5, "old_values": torch.zeros(1, dtype=torch.float64)}
    assert _single(0.4, 1.0, **clip) == pytest.approx((0.18, -0.6)), "inside: the plain loss"
    assert _single(0.8, 1.0, **clip) == pytest.approx((0.125, 0.0)), "towards the target, beyond the clip: held"
    assert _single(-0.8, 1.0, **clip) == pytest.approx((1.62, -1.8)), "away from the target: full gradient back"


@pytest.mark.parametrize("huber_delta", [None, 0.7])
@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_gradcheck(huber_delta, value_clip):
    values, returns, old_values, mask = _batch()
    options = {"huber_delta": huber_delta, "value_clip": value_clip}
    if value_clip:
        options["old_values"] = old_values

    def loss(x: torch.Tensor) -> torch.Tensor:
        return value_loss(x, returns=returns, mask=mask, denominator=5, **options)[0]

    assert torch.autograd.gradcheck(loss, values.requires_grad_())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 3))
def test_splits_agree_and_explain_the_same_variance(seed, cut):
    values, returns, old_values, mask = _batch(seed)
    options: dict[str, Any] = {"denominator": int(mask.sum()), "value_clip": 0.2}
    loss, metrics = value_loss(values, returns=returns, mask=mask, old_values=old_values, **options)
    parts = [
        value_loss(
            values[rows].flatten(), returns=returns[rows].flatten(), mask=mask[rows].flatten(),
            old_values=old_values[rows].flatten(), **options,
        )
        for rows in (slice(None, cut), slice(cut, None))
    ]  # fmt: skip
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    means = {name: float(x) for name, x in m.means(m.add(part[1] for part in parts)).items()}
    assert means["value_loss"] == pytest.approx(float(loss))
    r, v = returns[mask], values[mask]
    direct = 1 - float((r - v).var(correction=0) / r.var(correction=0))
    assert m.explained_variance(means) == pytest.approx(direct)
    assert m.explained_variance({name: float(x) for name, x in m.means(metrics).items()}) == pytest.approx(direct)


def test_explained_variance_of_equal_returns_is_zero():
    values, mask = torch.randn(4), torch.ones(4, dtype=torch.bool)
    _, metrics = value_loss(values, returns=torch.full((4,), 0.3), mask=mask, denominator=4)
    assert m.explained_variance({name: float(x) for name, x in m.means(metrics).items()}) == pytest.approx(0.0)


@pytest.mark.parametrize(("constant", "count"), [(0.1, 1000), (-0.7, 40001), (1 / 3, 40001)])
def test_rounding_is_no_variance(constant, count):
    """Means of squares of these constants differ from the squared mean in the last places."""
    values, mask = torch.randn(count), torch.ones(count, dtype=torch.bool)
    _, metrics = value_loss(values, returns=torch.full((count,), constant), mask=mask, denominator=count)
    assert m.explained_variance({name: float(x) for name, x in m.means(metrics).items()}) == 0.0


def test_bounded_values():
    raw = torch.linspace(-50, 50, 101, dtype=torch.float64, requires_grad=True)
    bounded = bound_values(raw, -1.0, 3.0)
    assert bounded.min() >= -1 and bounded.max() <= 3 and (bounded.diff() >= 0).all()
    near = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bound_values(x, -1.0, 3.0), near)
    middle = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    bound_values(middle, -1.0, 3.0).backward()
    assert float(bound_values(middle, -1.0, 3.0)) == 1.0 and middle.grad is not None and float(middle.grad) == 1.0
