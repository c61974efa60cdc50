"""KL estimators and coefficient; rewards per token; penalty and filter for overlong responses."""

import pytest
import torch

from megatron_vcppo.algo.kl import kl_estimate, next_kl_coef, soft_overlong_penalty, token_rewards


def test_kl_estimates_by_hand():
    logprobs, ref = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([-1.5, -1.0, -0.5]).double()
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k1"), torch.tensor([0.5, -1.0, 0.0]).double())
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k2"), torch.tensor([0.125, 0.5, 0.0]).double())
    e = torch.e
    torch.testing.assert_close(kl_estimate(logprobs, ref, "k3"), torch.tensor([e**-0.5 - 0.5, e - 2, 0.0]).double())
    with pytest.raises(AssertionError, match="k4"):
        kl_estimate(logprobs, ref, "k4")


def test_kl_estimates_have_the_promised_expectations():
    """Over all tokens of a small vocabulary: k1 and k3 average to the divergence; gradients as documented."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), dim=0)
    logprobs = torch.log_softmax(logits, dim=0)
    probs = logprobs.exp()
    divergence = (probs * (logprobs - ref)).sum()
    true_gradient = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
    for kind in ("k1", "k3"):
        torch.testing.assert_close((probs * kl_estimate(logprobs, ref, kind)).sum(), divergence)
    gradients = {
        kind: torch.autograd.grad((probs.detach() * kl_estimate(logprobs, ref, kind)).sum(), logits, retain_graph=True)[
            0
        ]
        for kind in ("k1", "k2")
    }
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(logits), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(gradients["k2"], true_gradient)


@pytest.mark.parametrize(
    ("observed_kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2)],
    ids=["met", "above", "bounded", "below"],
)
def test_adaptive_coefficient_moves_towards_its_target(observed_kl, error):
    moved = next_kl_coef(0.1, observed_kl=observed_kl, target_kl=6.0, num_rollouts=500, horizon=10000)
    assert moved == pytest.approx(0.1 * (1 + error * 0.05))


def test_reward_sits_on_the_last_valid_token():
    mask = torch.tensor([[True, False, True, False], [True, True, True, True], [False] * 4])
    rewards = torch.tensor([1.0, -1.0, 5.0])
    expected = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, -1.0], [0.0] * 4])
    assert torch.equal(token_rewards(rewards, mask), expected)
    kl = torch.full((3, 4), 2.0)
    kl[~mask] = torch.nan
    torch.testing.assert_close(token_rewards(rewards, mask, kl, 0.1), expected - 0.2 * mask)


def test_soft_overlong_penalty_is_dapos():
    lengths = torch.tensor([100, 16384, 18432, 20480, 30000])
    expected = torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0])
    torch.testing.assert_close(soft_overlong_penalty(lengths, max_length=20480, buffer=4096), expected)
