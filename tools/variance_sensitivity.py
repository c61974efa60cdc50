"""Why value regression tolerates variance and the policy gradient does not: the formulas of docs/theory.md, measured.

    python tools/variance_sensitivity.py            # half a minute of one core

Prints four tables. 1 to 3 compare a formula with a simulation of the very recursion that it describes. 4 is the
experiment: an actor and a critic learn together, with noise on the critic's returns or on the actor's advantages, each
in standard deviations of what it is added to.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np

from megatron_vcppo.report.text_table import text_table

Rows = list[dict[str, object]]


def regression_error(rate: float, noise: float) -> float:
    """Mean squared error at which V ← V + rate (V* + noise - V) stays."""
    return rate / (2 - rate) * noise**2


def simulate_regression(rate: float, noise: float, steps: int, generator: np.random.Generator) -> float:
    """The same, measured over 20,000 states."""
    values = np.zeros(20_000)
    for _ in range(steps):
        values += rate * (1.0 + noise * generator.standard_normal(values.shape) - values)
    return float(np.mean((values - 1.0) ** 2))


def simulate_decision(
    gap: float, rate: float, noise: float, steps: int, generator: np.random.Generator, runs: int = 20_000
) -> np.ndarray:
    """Logits [runs] of one decision between two actions after REINFORCE with the exact baseline.

    gap: by how much the first action is better. noise: standard deviation of what is added to the advantage.
    """
    logits = np.zeros(runs)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-logits))
        first = generator.random(runs) < p
        advantage = np.where(first, (1 - p) * gap, -p * gap) + noise * generator.standard_normal(runs)
        logits += rate * advantage * (first - p)
    return logits


def normal_cdf(x: float) -> float:
    """P(standard normal < x)."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def updates_to_learn(
    return_noise: float,
    advantage_noise: float,
    *,
    rate: float,
    critic_rate: float,
    lam: float,
    length: int,
    most: int,
    generator: np.random.Generator,
    batch: int = 64,
    runs: int = 24,
    level: float = 0.9,
) -> float:
    """Median over runs of the updates until the mean probability of the right action reaches ``level``.

    A response is ``length`` decisions between two actions, each with a logit; the reward, at the end, is 1 or -1 with a
    probability given by the share of right ones. The critic is a table over (position, right ones so far) that learns
    noisy Monte-Carlo returns; the actor follows GAE with ``lam``. Runs that never get there count as ``most``.
    """
    logits, values = np.zeros((runs, length)), np.zeros((runs, length + 1, length + 1))
    reached = np.full(runs, float(most))
    index, times = np.arange(runs)[:, None, None], np.arange(length)
    for update in range(1, most + 1):
        p = 1 / (1 + np.exp(-logits))
        actions = generator.random((runs, batch, length)) < p[:, None]
        so_far = np.concatenate([np.zeros((runs, batch, 1), dtype=int), np.cumsum(actions, axis=2)], axis=2)
        right = so_far[:, :, -1] / length
        rewards = np.where(generator.random((runs, batch)) < right, 1.0, -1.0)
        v = values[index, times, so_far[:, :, :-1]]
        deltas = np.concatenate([v[:, :, 1:], rewards[:, :, None]], axis=2) - v
        advantages = np.empty_like(deltas)
        running = np.zeros((runs, batch))
        for t in reversed(range(length)):
            running = deltas[:, :, t] + lam * running
            advantages[:, :, t] = running
        advantages -= advantages.mean(axis=(1, 2), keepdims=True)
        advantages /= advantages.std(axis=(1, 2), keepdims=True) + 1e-9
        advantages += advantage_noise * generator.standard_normal((runs, batch, 1))
        logits += rate * (advantages * (actions - p[:, None])).mean(axis=1)
        spread = rewards.std(axis=1, keepdims=True)
        targets = rewards + return_noise * spread * generator.standard_normal((runs, batch))
        sums, counts = np.zeros_like(values), np.zeros_like(values)
        cells = (np.broadcast_to(index, v.shape), np.broadcast_to(times, v.shape), so_far[:, :, :-1])
        np.add.at(sums, cells, np.broadcast_to(targets[:, :, None], v.shape))
        np.add.at(counts, cells, 1.0)
        seen = counts > 0
        values[seen] += critic_rate * (sums[seen] / counts[seen] - values[seen])
        newly = (p.mean(axis=1) >= level) & (reached == most)
        reached[newly] = update
        if (reached < most).all():
            break
    return float(np.median(reached))


def regression_rows(noises: Sequence[float], generator: np.random.Generator) -> Rows:
    """Table 1: the error is bounded, whatever the number of steps."""
    rows: Rows = []
    for noise in noises:
        found = [simulate_regression(0.05, noise, steps, generator) for steps in (200, 800)]
        rows.append(
            {"noise": noise, "formula": regression_error(0.05, noise), "200 steps": found[0], "800 steps": found[1]}
        )
    return rows


def neutral_rows(noises: Sequence[float], generator: np.random.Generator) -> Rows:
    """Table 2: the logit of a decision that does not matter walks away."""
    rows: Rows = []
    for noise in noises:
        row: dict[str, object] = {"noise": noise}
        for steps in (200, 800):
            row[f"formula, {steps} steps"] = 0.02**2 * noise**2 * steps / 4
            row[f"{steps} steps"] = float(simulate_decision(0.0, 0.02, noise, steps, generator).var())
        rows.append(row)
    return rows


def wrong_side_rows(noises: Sequence[float], generator: np.random.Generator) -> Rows:
    """Table 3: how often a decision that matters has gone the wrong way."""
    rows: Rows = []
    for noise in noises:
        row: dict[str, object] = {"noise": noise}
        for steps in (200, 800):
            row[f"formula, {steps} steps"] = normal_cdf(-0.1 * math.sqrt(steps) / (2 * noise)) if noise else 0.0
            row[f"{steps} steps"] = float((simulate_decision(0.1, 0.005, noise, steps, generator) < 0).mean())
        rows.append(row)
    return rows


def slowdown_rows(noises: Sequence[float], generator: np.random.Generator) -> Rows:
    """Table 4: updates until the actor has learned, and over those without noise."""
    settings = {"critic_rate": 0.1, "lam": 0.9, "length": 20, "most": 400, "generator": generator}

    def fastest(return_noise: float, advantage_noise: float) -> float:
        """Of a few learning rates: a noisy gradient may want a smaller one."""
        rates = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
        return min(updates_to_learn(return_noise, advantage_noise, rate=rate, **settings) for rate in rates)  # type: ignore[arg-type]

    clean = fastest(0.0, 0.0)
    rows: Rows = [{"noise": 0.0, "updates, noise on returns": clean, "updates, noise on advantages": clean}]
    for noise in noises:
        found = (fastest(noise, 0.0), fastest(0.0, noise))
        rows.append(
            {
                "noise": noise,
                "updates, noise on returns": found[0],
                "slowdown": found[0] / clean,
                "updates, noise on advantages": found[1],
                "slowdown ": found[1] / clean,
            }
        )
    return rows


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--noise", nargs="+", type=float, default=[1.0, 2.0, 4.0], help="standard deviations (1 2 4)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    for title, rows in (
        ("1. Squared error of a value under noisy targets, rate 0.05", regression_rows),
        ("2. Variance of the logit of a decision that does not matter, rate 0.02", neutral_rows),
        (
            "3. Share of runs in which the better of two actions (by 0.1) has become the rarer, rate 0.005",
            wrong_side_rows,
        ),
        ("4. Updates until 90 % of 20 decisions are right, each at the best of six rates", slowdown_rows),
    ):
        print(f"{title}\n{text_table(rows(args.noise, generator))}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
