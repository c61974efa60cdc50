"""An experiment as tables and sentences: means over seeds, differences between arms by seed, the verdicts. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vcppo.algo.seed_statistics import (
    Interval,
    Mean,
    Verdict,
    correlation,
    interval_of,
    judge,
    mean_over,
    paired_differences,
)
from megatron_vcppo.report.experiment_question import Claim
from megatron_vcppo.report.experiment_results import ExperimentResults
from megatron_vcppo.report.run_outcomes import OUTCOMES, outcome_of
from megatron_vcppo.report.text_table import short

NOTHING = 1e-12
"""Smaller differences are of the arithmetic."""
RULE = (
    "A claim is supported if the 95 % interval of its number (Student's t over the differences by seed; Fisher's z for "
    "a correlation over runs) lies wholly on the claimed side, contrary if it lies wholly on the other side, and "
    "otherwise not supported. One seed is not judged, but for pass@1, where the interval over the held-out problems "
    "stands in and says nothing about other seeds."
)


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict and the numbers behind it."""

    text: str
    verdict: Verdict
    numbers: str


def judged_claims(results: ExperimentResults) -> list[Judged]:
    """Every claim of the question, in its order."""
    return [judged(claim, results) for claim in results.question.claims]


def judged(claim: Claim, results: ExperimentResults) -> Judged:
    """One claim."""
    if claim.correlation:
        return _judged_correlation(claim, claim.correlation, results)
    outcome, ours = OUTCOMES[claim.outcome], results.values(claim.higher, claim.outcome)
    scale = outcome.scale
    if isinstance(claim.than, str):
        theirs = results.values(claim.than, claim.outcome)
        differences = [*paired_differences(ours, theirs).values()]
        paired = ours.keys() & theirs.keys()  # the means that are shown are of the seeds that are compared
        ours, theirs = ({seed: side[seed] for seed in sorted(paired)} for side in (ours, theirs))
        against = f"{mean_text(theirs, scale)} in {claim.than}"
    else:
        differences = [value - claim.than for value in ours.values()]
        against = short(scale * claim.than)
    if not differences:
        return Judged(claim.text, "not judged", f"{outcome.label}: no seed that both sides have")
    mean = mean_over(differences)
    interval, of = interval_of(mean), f"{mean.count} seeds"
    if interval is None and claim.outcome == "pass@1":
        interval, of = _interval_over_problems(claim, results, next(iter(ours))), "one seed; interval over problems"
    numbers = f"{outcome.label}: {mean_text(ours, scale)} in {claim.higher} against {against}; "
    numbers += f"difference {signed(scale * mean.value)}"
    numbers += " (one seed)" if interval is None else f", 95 % interval {_range(interval, scale)} ({of})"
    if claim.by:
        numbers += f"; claimed: above {signed(scale * claim.by)}"
    return Judged(claim.text, judge(interval, claim.by), numbers)


def _judged_correlation(claim: Claim, pair: tuple[str, str], results: ExperimentResults) -> Judged:
    found = [(outcome_of(pair[0], run.data), outcome_of(pair[1], run.data)) for run in results.runs]
    both = [(x, y) for x, y in found if x is not None and y is not None]
    interval = correlation([x for x, _ in both], [y for _, y in both])
    names = " and ".join(OUTCOMES[name].label for name in pair)
    if interval is None:
        return Judged(claim.text, "not judged", f"{names}: {len(both)} runs have both, and they must differ")
    numbers = f"{names}: correlation {signed(interval.value)} over {len(both)} runs, 95 % interval {_range(interval)}"
    signed_interval = interval
    if claim.sign < 0:
        signed_interval = Interval(-interval.value, -interval.high, -interval.low)
    return Judged(claim.text, judge(signed_interval), numbers)


def _interval_over_problems(claim: Claim, results: ExperimentResults, seed: int) -> Interval | None:
    """Of a difference in pass@1 of this seed, from the evaluation's 95 % intervals of both sides."""
    arms = [claim.higher, *([claim.than] if isinstance(claim.than, str) else [])]
    of_seed = [run for run in results.runs if run.seed == seed]
    rows = [
        next((row for run in of_seed if run.arm == arm for row in run.data.results if row["name"] == "ppo"), None)
        for arm in arms
    ]
    if any(row is None for row in rows):
        return None
    scores = [float(row["avg"]) for row in rows if row is not None]
    width = math.hypot(*(float(row["avg_interval"]) for row in rows if row is not None))
    difference = scores[0] - (scores[1] if len(scores) == 2 else float(claim.than))
    return Interval(difference, difference - width, difference + width)


def arm_rows(results: ExperimentResults) -> list[dict[str, str]]:
    """One row per arm: its seeds, and each outcome that any run has as mean ± standard error."""
    rows = []
    for arm in results.question.arms:
        seeds = [run.seed for run in results.runs if run.arm == arm]
        row = {"arm": arm, "seeds": str(len(seeds))}
        row |= {OUTCOMES[name].label: _cell(results, arm, name) for name in _present(results)}
        rows.append(row)
    return rows


def difference_rows(results: ExperimentResults) -> list[dict[str, str]]:
    """One row per arm but the one that it is compared with: differences by seed, mean ± standard error."""
    against, rows = results.question.against, []
    for arm in results.question.arms:
        if arm == against:
            continue
        row = {"arm": f"{arm} − {against}"}
        for name in _present(results):
            scale = OUTCOMES[name].scale
            differences = paired_differences(results.values(arm, name), results.values(against, name))
            row[OUTCOMES[name].label] = mean_text(differences, scale, signed) if differences else ""
        rows.append(row)
    return rows


def seed_rows(results: ExperimentResults) -> list[dict[str, str]]:
    """One row per run: the same outcomes without a mean."""
    rows = []
    for run in results.runs:
        row = {"arm": run.arm, "seed": str(run.seed)}
        for name in _present(results):
            value = outcome_of(name, run.data)
            row[OUTCOMES[name].label] = "" if value is None else short(value * OUTCOMES[name].scale)
        rows.append(row)
    return rows


def _present(results: ExperimentResults) -> list[str]:
    """The outcomes of the question that any run has."""
    named = results.question.outcomes
    return [name for name in named if any(outcome_of(name, run.data) is not None for run in results.runs)]


def _cell(results: ExperimentResults, arm: str, name: str) -> str:
    values = results.values(arm, name)
    return mean_text(values, OUTCOMES[name].scale) if values else ""


def mean_text(values: dict[int, float], scale: float = 1.0, number: Callable[[float], str] = short) -> str:
    """Mean ± standard error over seeds. Example: 83.6 ± 2.4; of a single seed: 83.6."""
    if not values:
        return "nothing"
    mean: Mean = mean_over([*values.values()])
    text = number(scale * mean.value)
    return text if mean.error is None else f"{text} ± {short(scale * mean.error)}"


def signed(value: float) -> str:
    """Example: +0.25, −3. What only the order of a sum leaves is +0."""
    if abs(value) < NOTHING:
        return "+0"
    return f"{'−' if value < 0 else '+'}{short(abs(value))}"


def _range(interval: Interval, scale: float = 1.0) -> str:
    return f"{signed(scale * interval.low)} to {signed(scale * interval.high)}"


def summary_lines(claims: Sequence[Judged]) -> list[str]:
    """The verdicts as text, a line each."""
    return [f"{claim.verdict}: {claim.text} ({claim.numbers})" for claim in claims]
