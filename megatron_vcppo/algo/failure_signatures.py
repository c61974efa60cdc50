"""From a run's metrics to the failures that the paper names: the evidence and what to change.

Sources: VC-PPO §3.2 (length collapse, value initialization bias), §3.3 (reward signal decay), and its practical
signatures; thresholds are this project's own, each explained where it stands.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vcppo.algo.seed_statistics import mean_over

History = Sequence[Mapping[str, Any]]

# A response length that falls by a third is far outside the noise of a batch mean, and well before the floor.
LENGTH_DROP = 0.33
# In standard deviations: of the advantages for one token (beyond it, to give up looks better than most that could be
# written), of the rewards for early against late ones. The paper's failure has 0.69 + 0.35 with rewards of ±1.
POSITION_BIAS = 0.5
# Of the returns' variance. A critic that knows nothing is at 0, and a little below it where its mean lags behind a
# policy that gets better, which harms nobody.
UNEXPLAINED = 0.05
# With λ_critic = 1 and γ = 1 the share is 1; below 1 % the outcome is lost in the critic's own error.
TERMINAL_SHARE = 0.01
# In standard deviations of the rewards: how far the first token's value may be from their mean. A pretrained critic
# whose targets decay lags behind a policy that gets better by up to 0.85; one that starts wrong stays so, by 1.3 to 2.
FIRST_VALUE_ERROR = 1.0
# Scatter around the straight trend, relative to the mean loss.
OSCILLATION = 0.3
TRUNCATED_SHARE = 0.3
# In standard deviations of the first scores: a rise of a batch's mean by half of one is no chance at 64 responses.
SCORE_RISE = 0.5
# Accuracy points: the verifier's verdict on what the reward model came to like.
ACCURACY_DROP = 0.05
# Mean of the last iterations; where score and verdict are independent it is within 0.06 of 0 at 64 responses.
AGAINST_VERIFIER = -0.15
# Beyond it the scores tell hardly more than how long a response is.
LENGTH_CORRELATION = 0.8
_RECENT = 5
_MIN_ITERATIONS = 3
_MIN_ITERATIONS_OSCILLATION = 8
_REPLAYED = 50
"""Enough for a sign that lasts, at a cost that a long history does not square."""
_LIKED = ("verifier", "length")


@dataclass(frozen=True)
class Sign:
    """One number of a history that a signature compares with a threshold; above it is bad."""

    text: str
    threshold: float


SIGNS = {
    "length_drop": Sign("mean length dropped by more than {plus}", LENGTH_DROP),
    "unexplained": Sign("explained variance below {minus}", UNEXPLAINED),
    "give_up": Sign("advantage of giving up above {plus} σ", POSITION_BIAS),
    "below_worst": Sign("first token's value below the worst reward by more than {plus}", 0.0),
    "early_late": Sign("early minus late advantage above {plus} standard deviations of the reward", POSITION_BIAS),
}
"""By the names of ``sign_scores``; those behind length_collapse and value_misalignment."""


@dataclass(frozen=True)
class Finding:
    """One failure signature and whether a history shows it.

    Example: ``Finding("length_collapse", "found", "mean length fell from 92.0 to 5.0 …", "pretrain the critic …")``.
    """

    signature: str
    state: str
    """found | absent | unknown (the metrics that it needs are missing or too few)"""
    evidence: str
    advice: str = ""
    """What to change; empty unless found."""


def diagnose(history: History, worst_reward: float | None = None) -> list[Finding]:
    """One finding per signature, in a fixed order; reward_hacking only for a run with a reward model.

    history: one mapping per iteration, oldest first, as in metrics.jsonl: the names of ``diagnostics.summarize`` and
    ``length_statistics``, and critic/value_loss; iterations may lack any of them, and what is not a finite number is
    ignored. worst_reward: the lowest that the verifier gives; values below it are impossible and count as
    misalignment.
    """
    return [
        _length_collapse(history),
        _value_misalignment(history, worst_reward),
        _reward_decay(history),
        _value_loss_oscillation(history),
        _truncation(history),
        *([_reward_hacking(history)] if any(_has(row, "model_reward/score_mean") for row in history) else []),
    ]


def warnings_of(history: History, worst_reward: float | None, known: set[str]) -> list[str]:
    """One line per failure signature that the history shows and ``known`` does not hold; they are added to it."""
    new = [
        finding
        for finding in diagnose(history, worst_reward)
        if finding.state == "found" and finding.signature not in known
    ]
    known |= {finding.signature for finding in new}
    return [f"{finding.signature}: {finding.evidence}; {finding.advice}" for finding in new]


def warned_before(history: History, worst_reward: float | None) -> set[str]:
    """The signatures that an interrupted run has printed, found at up to about _REPLAYED points of its history."""
    known: set[str] = set()
    for count in range(len(history), 0, -max(1, len(history) // _REPLAYED)):
        warnings_of(history[:count], worst_reward, known)
    return known


def _length_collapse(history: History) -> Finding:
    name = "length_collapse"
    iterations, lengths = _series(history, "rollout/length_mean")
    if len(lengths) < _MIN_ITERATIONS:
        return _unknown(name, "rollout/length_mean", len(lengths))
    smooth, drop = _smooth(lengths), sign_scores(history, None)["length_drop"]
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    evidence = (
        f"mean length: {max(smooth[:2]):.1f} tokens at the start, "
        f"lowest {smooth[lowest]:.1f} at iteration {iterations[lowest]} "
        f"({-drop:+.0%}), now {lengths[-1]:.1f}"
    )
    advice = (
        "the critic's initial values make stopping early look good: pretrain the critic on Monte-Carlo returns of the "
        "SFT policy before PPO, and look at the give-up advantage and the value of the first token"
    )
    return _finding(name, drop > SIGNS["length_drop"].threshold, evidence, advice)


def sign_scores(history: History, worst_reward: float | None) -> dict[str, float]:
    """The signs of SIGNS that a history allows, of its last iterations; in each a higher number is worse.

    Single batches scatter, most where few responses count: giving up in a wrong response becomes rare as the policy
    gets better, and a critic that knows nothing has an explained variance around 0. So give_up and early_late are what
    the mean of the last iterations exceeds at 95 % by their own scatter, from three iterations on, and unexplained is
    the least of them: of a critic that starts wrong and learns fast the scatter is mostly trend. A value below the
    worst reward is impossible at any scatter, and counts from the first one. early_late is in standard deviations of
    the reward: those of the advantages are a few tenths of it under a critic that says about the same at every token,
    and the error of one batch's mean outcome, which a sound critic also has, would look large.
    """
    scores = {}
    lengths = _series(history, "rollout/length_mean")[1]
    if len(lengths) >= _MIN_ITERATIONS:
        smooth = _smooth(lengths)
        start = max(smooth[0], smooth[1])
        scores["length_drop"] = 1.0 - min(smooth) / start if start > 0 else 0.0
    # Where every response got the same reward there is no variance to explain, and 0 means nothing.
    varied = [row for row in history if row.get("rollout/reward_std") != 0]
    noisy = {
        "give_up": _series(history, "actor/give_up_advantage_sigma")[1],
        "early_late": [
            row["actor/advantage_early_late_gap"] / row["rollout/reward_std"]
            for row in varied
            if _has(row, "actor/advantage_early_late_gap") and _has(row, "rollout/reward_std")
        ],
    }
    scores |= {name: _at_least(values[-_RECENT:]) for name, values in noisy.items() if len(values) >= _MIN_ITERATIONS}
    unexplained = [-ev for ev in _series(varied, "critic/explained_variance")[1]][-_RECENT:]
    if len(unexplained) >= _MIN_ITERATIONS:
        scores["unexplained"] = min(unexplained)
    first_values = _series(history, "critic/value_first_token")[1]
    if worst_reward is not None and first_values:
        scores["below_worst"] = worst_reward - _mean(first_values[-_RECENT:])
    return scores


def _at_least(values: Sequence[float]) -> float:
    """The lower end of the 95 % interval of the mean of at least two numbers."""
    mean = mean_over(values)
    return mean.value - (mean.half_width or 0.0)


def _smooth(values: Sequence[float]) -> list[float]:
    """The median of three neighbors, which ignores a single odd batch."""
    return [float(np.median(values[max(0, i - 1) : i + 2])) for i in range(len(values))]


def _value_misalignment(history: History, worst_reward: float | None) -> Finding:
    """The critic is wrong in a direction that the actor follows.

    Early tokens above late ones is the paper's sign. Late above early is what a critic shows that lags behind a policy
    that gets better: its surprise at the end reaches the early tokens only with λ^distance.
    """
    name, scores = "value_misalignment", sign_scores(history, worst_reward)
    signs = [
        (scores[key] > SIGNS[key].threshold, text, _series(history, metric)[1])
        for key, text, metric in (
            ("unexplained", "explained variance", "critic/explained_variance"),
            ("give_up", "give-up advantage in σ", "actor/give_up_advantage_sigma"),
            (
                "below_worst",
                f"value of the first token (worst reward {worst_reward or 0:+g})",
                "critic/value_first_token",
            ),
            ("early_late", "early minus late advantage", "actor/advantage_early_late_gap"),
        )
        if key in scores
    ]
    if not signs:
        return _unknown(name, "critic/explained_variance", len(_series(history, "critic/explained_variance")[1]))
    evidence = f"{_recent(len(history))}, mean: " + "; ".join(
        f"{text} {_mean(values[-_RECENT:]):+.3f}{' (bad)' if bad else ''}" for bad, text, values in signs
    )
    advice = (
        "the critic does not fit this policy: pretrain it longer (watch its explained variance on held-out rollouts), "
        "use λ_critic = 1, raise the critic's learning rate relative to the actor's, or warm it up alone first"
    )
    return _finding(name, any(bad for bad, *_ in signs), evidence, advice)


def _reward_decay(history: History) -> Finding:
    """The outcome does not reach the first token's target, and its value shows it: a sound critic bears decay."""
    name, metric, value = "reward_decay", "critic/terminal_share_first_token", "critic/value_first_token"
    shares = _series(history, metric)[1]
    if not shares:
        return _unknown(name, metric, 0)
    share = _mean(shares[-_RECENT:])
    needed = (value, "rollout/reward_mean", "rollout/reward_std")
    rows = [row for row in history if all(_has(row, key) for key in needed) and row["rollout/reward_std"] > 0]
    errors = [(row[value] - row["rollout/reward_mean"]) / row["rollout/reward_std"] for row in rows]
    if share < TERMINAL_SHARE and not errors:
        return _unknown(name, value, 0)
    error = _mean(errors[-_RECENT:]) if errors else 0.0
    evidence = f"share of the final reward in the critic target of the first token: {share:.2g}"
    if errors:
        evidence += f"; its value is {error:+.2f} σ of the rewards from their mean"
    advice = "set λ_critic = 1 (with γ = 1), so that critic targets are undiscounted returns; keep λ_actor below 1"
    return _finding(name, share < TERMINAL_SHARE and abs(error) > FIRST_VALUE_ERROR, evidence, advice)


def _value_loss_oscillation(history: History) -> Finding:
    name, metric = "value_loss_oscillation", "critic/value_loss"
    losses = np.asarray(_series(history, metric)[1][-20:])
    if len(losses) < _MIN_ITERATIONS_OSCILLATION:
        return _unknown(name, metric, len(losses))
    steps = np.arange(len(losses))
    residuals = losses - np.polyval(np.polyfit(steps, losses, 1), steps)
    scatter = float(residuals.std() / max(abs(losses.mean()), 1e-12))
    swings = int((np.sign(residuals[1:]) != np.sign(residuals[:-1])).sum())
    evidence = (
        f"value loss of the last {len(losses)} iterations: mean {losses.mean():.3g}, "
        f"scatter around its trend {scatter:.0%}, {swings} swings"
    )
    advice = "raise λ_critic towards 1 or lower the critic's learning rate"
    # A single bend of a falling curve crosses its trend twice; an oscillation does so at least every fourth step.
    return _finding(name, scatter > OSCILLATION and swings >= max(3, len(losses) // 4), evidence, advice)


def _truncation(history: History) -> Finding:
    name, metric = "truncation", "rollout/truncated_share"
    shares = _series(history, metric)[1]
    if not shares:
        return _unknown(name, metric, 0)
    share = _mean(shares[-_RECENT:])
    evidence = f"share of responses truncated at the token limit, {_recent(len(shares))}: {share:.0%}"
    advice = "raise the limit on response tokens, or use the soft overlong penalty"
    return _finding(name, share > TRUNCATED_SHARE, evidence, advice)


def _reward_hacking(history: History) -> Finding:
    """The actor pleases the reward model without being right more often, or by length."""
    name, metric = "reward_hacking", "model_reward/score_mean"
    scores, accuracies, lengths = (
        _series(history, other)[1] for other in (metric, "rollout/accuracy", "rollout/length_mean")
    )
    spread = _series(history, "model_reward/score_std")[1]
    if min(map(len, (scores, accuracies, lengths, spread))) < 2 * _MIN_ITERATIONS:
        return _unknown(name, metric, len(scores))

    def ends(values: Sequence[float]) -> tuple[float, float]:
        count = min(_RECENT, len(values) // 2)
        return _mean(values[:count]), _mean(values[-count:])

    (score, last_score), (accuracy, last_accuracy), (length, last_length) = map(ends, (scores, accuracies, lengths))
    rise = (last_score - score) / max(ends(spread)[0], 1e-12)
    correlations = [_series(history, f"model_reward/{other}_correlation")[1][-_RECENT:] for other in _LIKED]
    with_verifier, with_length = (_mean(values) if values else math.nan for values in correlations)
    rises, grows = rise > SCORE_RISE, last_length > (1 + LENGTH_DROP) * length
    text = f"score {rise:+.2f} σ since the start, accuracy {accuracy:.0%} → {last_accuracy:.0%}"
    signs = [(rises and last_accuracy < accuracy - ACCURACY_DROP, text)]
    if math.isfinite(with_verifier):
        signs.append((with_verifier < AGAINST_VERIFIER, f"correlation of score and verdict {with_verifier:+.2f}"))
    if math.isfinite(with_length):
        text = f"of score and length {with_length:+.2f}, length {length:.0f} → {last_length:.0f} tokens"
        follows = rises and grows and with_length > LENGTH_CORRELATION
        signs.append((follows and last_accuracy <= accuracy, text))
    evidence = "; ".join(f"{text} (bad)" if bad else text for bad, text in signs)
    advice = (
        "the actor learns what the reward model likes, not what is right: lower rewards.model.weight against "
        "verifier_weight, set rewards.model.clip or a KL term (ppo.loss.kl_coef), train the reward model on current "
        "responses, or stop before the accuracy falls"
    )
    return _finding(name, any(bad for bad, _ in signs), evidence, advice)


def _series(history: History, metric: str) -> tuple[list[int], list[float]]:
    """(iterations, finite values) of one metric."""
    rows = [(int(row.get("iteration", i)), float(row[metric])) for i, row in enumerate(history) if _has(row, metric)]
    return [i for i, _ in rows], [value for _, value in rows]


def _has(row: Mapping[str, Any], metric: str) -> bool:
    value = row.get(metric)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _recent(count: int) -> str:
    """Which iterations an average of the last ones covers, as text."""
    return "first iteration" if count == 1 else f"last {min(_RECENT, count)} iterations"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finding(signature: str, found: bool, evidence: str, advice: str) -> Finding:
    return Finding(signature, "found" if found else "absent", evidence, advice if found else "")


def _unknown(signature: str, metric: str, count: int) -> Finding:
    return Finding(signature, "unknown", f"{metric} is there for {count} iterations: too few to judge")
