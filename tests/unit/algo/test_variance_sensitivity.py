"""The computation behind docs/theory.md, at small sizes."""

import numpy as np
import pytest

from tools.variance_sensitivity import regression_error, simulate_decision, simulate_regression, updates_to_learn


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_the_error_of_a_regression_stays_what_the_formula_says(noise: float) -> None:
    for steps in (60, 180):
        found = simulate_regression(0.1, noise, steps, np.random.default_rng(0))
        assert found == pytest.approx(regression_error(0.1, noise), rel=0.05)


def test_an_idle_logit_walks_on_and_on() -> None:
    """To 0.02² n / 4 with noise 1: four times as far in four times the steps."""
    for steps in (200, 800):
        walked = simulate_decision(0.0, 0.02, 1.0, steps, np.random.default_rng(0))
        assert float(walked.var()) == pytest.approx(0.02**2 * steps / 4, rel=0.05)


def test_noise_turns_decisions_that_matter() -> None:
    """Φ(-0.1 · 10 / 2) = 30.9 % with noise 1, and hardly any without."""
    noisy, exact = (simulate_decision(0.1, 0.01, noise, 100, np.random.default_rng(0)) for noise in (1.0, 0.0))
    assert float((noisy < 0).mean()) == pytest.approx(0.309, abs=0.01)
    assert not (exact < 0).any()


def test_noise_on_the_advantages_costs_more_than_on_the_returns() -> None:
    def updates(return_noise: float, advantage_noise: float) -> float:
        return updates_to_learn(
            return_noise,
            advantage_noise,
            rate=1.0,
            critic_rate=0.1,
            lam=0.9,
            length=20,
            most=400,
            generator=np.random.default_rng(0),
            runs=8,
        )

    clean, on_returns, on_advantages = updates(0.0, 0.0), updates(4.0, 0.0), updates(0.0, 4.0)
    assert on_returns < 1.25 * clean and on_advantages > 1.5 * clean
