"""Pairwise and pointwise losses of the reward model."""

import math
from typing import Any

import pytest
import torch

from megatron_vcppo.algo import metrics as m
from megatron_vcppo.algo.losses.value import pairwise_loss, pointwise_loss
from megatron_vcppo.algo.masked import last_valid


def test_pairwise_by_hand():
    chosen = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = pairwise_loss(chosen=chosen, rejected=rejected, denominator=2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.e)) / 2)
    sigmoid = [1 / (1 + math.e), 1 / (1 + math.exp(-1))]
    assert chosen.grad is not None
    torch.testing.assert_close(chosen.grad, -torch.tensor(sigmoid, dtype=torch.float64) / 2)
    torch.testing.assert_close(rejected.grad, -chosen.grad)
    means = m.means(metrics)
    assert float(means["accuracy"]) == 0.5 and float(means["margin"]) == 0.0
    assert torch.autograd.gradcheck(
        lambda a, b: pairwise_loss(chosen=a, rejected=b, denominator=3)[0], (chosen, rejected)
    )


def _scores():
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    scores = torch.tensor([[9.0, 0.7, 9.0], [9.0, 9.0, -0.4], [1.2, 9.0, 9.0]], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None].expand(3, 3)
    return scores.requires_grad_(), labels, last_valid(mask)


def test_pointwise_reads_last_tokens_only():
    scores, labels, last = _scores()
    read = torch.tensor([0.7, -0.4, 1.2], dtype=torch.float64)
    loss, metrics = pointwise_loss(scores, labels=labels, last_mask=last, kind="bce", denominator=3)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(read, labels[:, 0])
    torch.testing.assert_close(loss, expected)
    assert float(m.means(metrics)["accuracy"]) == pytest.approx(2 / 3)
    loss.backward()
    assert scores.grad is not None and (scores.grad[~last] == 0).all()
    loss, _ = pointwise_loss(scores, labels=labels, last_mask=last, kind="mse", denominator=3)
    torch.testing.assert_close(loss, 0.5 * (read - labels[:, 0]).square().mean())


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_pointwise_gradcheck_and_packed(kind):
    scores, labels, last = _scores()
    options: dict[str, Any] = {"kind": kind, "denominator": 3, "label_smoothing": 0.05 if kind == "bce" else 0.0}
    assert torch.autograd.gradcheck(lambda x: pointwise_loss(x, labels=labels, last_mask=last, **options)[0], scores)
    padded = pointwise_loss(scores, labels=labels, last_mask=last, **options)[0]
    packed = pointwise_loss(scores.flatten(), labels=labels.flatten(), last_mask=last.flatten(), **options)[0]
    torch.testing.assert_close(packed, padded)


def test_label_smoothing_has_a_finite_best_score():
    """With smoothing s the best logit of a good response is log((1 - s) / s)."""
    score = torch.tensor([math.log(0.97 / 0.03)], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    pointwise_loss(score, labels=one, last_mask=one.bool(), kind="bce", denominator=1, label_smoothing=0.03)[
        0
    ].backward()
    assert score.grad is not None and float(score.grad) == pytest.approx(0.0, abs=1e-12)
