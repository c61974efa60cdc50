"""The built-in diagnosis over all runs of an experiment: hits and false alarms per signature, and of each sign alone.

A run has failed if its mean length fell below half of its start, or if it ended clearly below its SFT model; it is
healthy if its length stayed above three quarters and it did not end below. Runs between the two are not counted. These
words come from what happened in the end, not from what the signatures read on the way.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_vcppo.algo.failure_signatures import SIGNS, diagnose, sign_scores
from megatron_vcppo.algo.sign_thresholds import count, fit_threshold, halves
from megatron_vcppo.report.experiment_results import ExperimentRun
from megatron_vcppo.report.run_data import RunData, setting, worst_reward
from megatron_vcppo.report.run_outcomes import OUTCOMES, evaluated, gain, length_drop
from megatron_vcppo.report.text_table import short

EARLY = 3
"""Iterations within which a failure should be named."""
FAILED_DROP, HEALTHY_DROP = 0.5, 0.25
OF_THE_RUN = {"run", "stored_path"}
"""Keys of a configuration, in any section, that differ between two runs of the same settings."""
DIAGNOSIS_NOTE = (
    "Failed: the mean length fell below half of its start, or pass@1 ended below that of SFT by more than its interval "
    "(without an evaluation: the accuracy of the rollouts below half of its start). Healthy: neither, and the length "
    "never fell by a quarter. Other runs, those whose actor is never trained and those that have not ended are not "
    f"counted. Early: within the first {EARLY} iterations. A signature's row counts what the runs would print. Below "
    "them, the signs behind length_collapse and value_misalignment: the built-in threshold, and that which separates "
    f"the two classes best on every other run, both judged on the runs in between after {EARLY} iterations."
)

Class = Literal["failed", "healthy", "between"]


def outcome_class(run: RunData) -> Class:
    """What became of a run; one whose actor is never trained is between: nothing can become of it. So is one that has
    not come to the end of PPO, unless its length is gone already."""
    alone, iterations = (setting(run.config, f"ppo.{name}") for name in ("critic_only_iterations", "iterations"))
    if (alone or 0) >= (iterations or 1):
        return "between"
    drop, worse = length_drop(run), _got_worse(run)
    if worse or (drop is not None and drop > FAILED_DROP):
        return "failed"
    return "healthy" if "ppo" in run.done and drop is not None and drop < HEALTHY_DROP else "between"


def _got_worse(run: RunData) -> bool:
    change, interval = gain(run), evaluated("ppo", "avg_interval")(run)
    if change is not None and interval is not None:
        return change < -interval
    accuracies = [y for _, y in run.series("ppo", "rollout/accuracy")]
    ends = OUTCOMES["accuracy_last"].of(run)
    return bool(accuracies) and ends is not None and ends < FAILED_DROP * accuracies[0]


def distinct(runs: Sequence[ExperimentRun]) -> list[RunData]:
    """The first of the runs that have the same settings and seed: several experiments have an arm in common, and a run
    that a threshold was fitted on must not judge it under another name."""
    found: list[RunData] = []
    seen: list[dict[str, Any]] = []
    for run in runs:
        settings = {**_settings(run.data.config), "seed": run.seed}
        if settings not in seen:
            seen.append(settings)
            found.append(run.data)
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in OF_THE_RUN
    }


def signature_rows(runs: Sequence[ExperimentRun]) -> list[dict[str, str]]:
    """One row per signature, then two per sign: its built-in and its fitted threshold. Empty without such runs."""
    trained = [run for run in distinct(runs) if run.history.get("ppo")]
    failed = [run for run in trained if outcome_class(run) == "failed"]
    healthy = [run for run in trained if outcome_class(run) == "healthy"]
    if not failed and not healthy:
        return []
    named_failed, named_healthy = ([first_named(run) for run in some] for some in (failed, healthy))
    names = [*dict.fromkeys(name for named in (*named_failed, *named_healthy) for name in named)]
    rows = []
    for label, signatures in [*((name, [name]) for name in names), ("any of them", names)]:
        firsts, alarms = (
            [min((named[name] for name in signatures if name in named), default=None) for named in some]
            for some in (named_failed, named_healthy)
        )
        early = sum(first is not None and first <= EARLY for first in firsts)
        rows.append(
            {
                "sign": label,
                "failed runs named early": f"{early} of {len(firsts)}",
                "failed runs named": f"{len(firsts) - firsts.count(None)} of {len(firsts)}",
                "healthy runs with an alarm": f"{len(alarms) - alarms.count(None)} of {len(alarms)}",
            }
        )
    return rows + threshold_rows(failed, healthy)


def threshold_rows(failed: Sequence[RunData], healthy: Sequence[RunData]) -> list[dict[str, str]]:
    """Of each sign: threshold fitted on one half of the runs, hits and false alarms on the other."""
    rows = []
    for name, sign in SIGNS.items():
        (fit_failed, judge_failed), (fit_healthy, judge_healthy) = (
            halves(early_scores(some, name)) for some in (failed, healthy)
        )
        fitted = fit_threshold(fit_failed, fit_healthy)
        if fitted is None or not judge_failed or not judge_healthy:
            continue
        for threshold, origin in ((sign.threshold, "built in"), (fitted, "fitted")):
            counts = count(judge_failed, judge_healthy, threshold)
            rows.append(
                {
                    "sign": f"{sign.text.format(plus=short(threshold), minus=short(-threshold))} ({origin})",
                    "failed runs named early": f"{counts.hits} of {counts.failed}",
                    "failed runs named": "",
                    "healthy runs with an alarm": f"{counts.false_alarms} of {counts.healthy}",
                }
            )
    return rows


def early_scores(runs: Sequence[RunData], sign: str) -> list[float]:
    """The score of one sign after EARLY iterations, of the runs that have it."""
    found = [sign_scores(run.history["ppo"][:EARLY], worst_reward(run.config)).get(sign) for run in runs]
    return [score for score in found if score is not None]


def first_named(run: RunData) -> dict[str, int]:
    """Signature → the iteration, counted from 1, in which the run prints it; those that it never prints are missing."""
    history, worst, found = run.history["ppo"], worst_reward(run.config), dict[str, int]()
    for number in range(1, len(history) + 1):
        for finding in diagnose(history[:number], worst):
            if finding.state == "found":
                found.setdefault(finding.signature, number)
    return found
