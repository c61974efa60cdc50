"""What came out of a run, one number each: the columns of an experiment's table and what its claims compare. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from megatron_vcppo.report.run_data import RunData

LAST = 3
"""Iterations over which what a run has at its end is averaged."""


@dataclass(frozen=True)
class Outcome:
    """One number of a run. ``of`` gives None where the run does not have it."""

    label: str
    of: Callable[[RunData], float | None]
    text: str
    """What it is, for docs/experiments.md."""
    percent: bool = False

    @property
    def scale(self) -> float:
        """From the number to what its label says."""
        return 100.0 if self.percent else 1.0


def evaluated(stage: str, key: str) -> Callable[[RunData], float | None]:
    """A number of the evaluation of a stage's actor."""
    return lambda run: next((float(row[key]) for row in run.results if row["name"] == stage), None)


def first(metric: str, stage: str = "ppo") -> Callable[[RunData], float | None]:
    """A metric in the first iteration that has it."""
    return lambda run: next((y for _, y in run.series(stage, metric)), None)


def last(metric: str, stage: str = "ppo", count: int = LAST) -> Callable[[RunData], float | None]:
    """Its mean over the last iterations."""
    return lambda run: mean_of([y for _, y in run.series(stage, metric)][-count:])


def after_first(metric: str) -> Callable[[RunData], float | None]:
    """Its mean over the three iterations after the first of PPO, which shows what PPO started from."""
    return lambda run: mean_of([y for _, y in run.series("ppo", metric)][1:4])


def mean_of(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def lowest_length(run: RunData) -> float | None:
    """The lowest mean length of the run; the median of three neighbors ignores a single odd batch."""
    lengths = [y for _, y in run.series("ppo", "rollout/length_mean")]
    return min((median(lengths[max(0, i - 1) : i + 2]) for i in range(len(lengths))), default=None)


def length_drop(run: RunData) -> float | None:
    """The share of its first length by which a run got shorter at the worst; negative: it only got longer."""
    start, lowest = first("rollout/length_mean")(run), lowest_length(run)
    return None if not start or lowest is None else 1.0 - lowest / start


def advantage_variance(run: RunData) -> float | None:
    """Of the advantages before whitening: the mean over iterations."""
    return mean_of([y * y for _, y in run.series("ppo", "actor/advantage_std")])


def gain(run: RunData) -> float | None:
    """pass@1 after PPO minus pass@1 after SFT, on the same problems."""
    before, after = evaluated("sft", "avg")(run), evaluated("ppo", "avg")(run)
    return None if before is None or after is None else after - before


def iterations_to(metric: str, level: float) -> Callable[[RunData], float | None]:
    """The first iteration from which the mean of LAST iterations reaches a level; None: never."""

    def of(run: RunData) -> float | None:
        points = run.series("ppo", metric)
        means = [(points[i][0], mean_of([y for _, y in points[i : i + LAST]])) for i in range(len(points) - LAST + 1)]
        return next((x for x, y in means if y is not None and y >= level), None)

    return of


OUTCOMES: dict[str, Outcome] = {
    "pass@1": Outcome(
        "pass@1 after PPO, %",
        evaluated("ppo", "avg"),
        "share of held-out problems that the actor after PPO solves with one sample",
        percent=True,
    ),
    "pass@1_sft": Outcome(
        "pass@1 after SFT, %",
        evaluated("sft", "avg"),
        "the same of the SFT model",
        percent=True,
    ),
    "gain": Outcome(
        "pass@1 gained by PPO, points",
        gain,
        "the first minus the second",
        percent=True,
    ),
    "accuracy_last": Outcome(
        "accuracy of rollouts, last, %",
        last("rollout/accuracy"),
        "share of right rollouts, mean over the last 3 iterations",
        percent=True,
    ),
    "iterations_to_60": Outcome(
        "iterations to 60 % accuracy",
        iterations_to("rollout/accuracy", 0.6),
        "the first iteration from which the mean accuracy of 3 iterations is at least 60 %; empty: never",
    ),
    "score_last": Outcome(
        "reward model's score, last",
        last("model_reward/score_mean"),
        "mean score of the rollouts by the reward model, last 3 iterations",
    ),
    "score_first": Outcome(
        "reward model's score, first",
        first("model_reward/score_mean"),
        "the same in the first iteration",
    ),
    "length_first": Outcome(
        "length, first",
        first("rollout/length_mean"),
        "mean tokens of a response in the first iteration",
    ),
    "length_lowest": Outcome(
        "length, lowest",
        lowest_length,
        "the lowest of the medians of 3 neighboring iterations, so that a single odd batch does not count; it can be "
        "above the first",
    ),
    "length_last": Outcome(
        "length, last",
        last("rollout/length_mean"),
        "mean over the last 3 iterations",
    ),
    "length_drop": Outcome(
        "length drop, %",
        length_drop,
        "share of the first length by which the lowest is below it; negative where it only grew",
        percent=True,
    ),
    "truncated_last": Outcome(
        "truncated, last, %",
        last("rollout/truncated_share"),
        "share of responses cut off at rollout.max_tokens, last 3 iterations",
        percent=True,
    ),
    "explained_variance_first": Outcome(
        "explained variance, first",
        first("critic/explained_variance"),
        "1 − var(target − value) / var(target) over the tokens of the first iteration, before the critic's update, "
        "with the critic's own targets (λ_critic); 0: the critic knows no more than the mean",
    ),
    "explained_variance_last": Outcome(
        "explained variance, last",
        last("critic/explained_variance"),
        "mean over the last 3 iterations",
    ),
    "mc_explained_variance_first": Outcome(
        "explained variance of Monte-Carlo returns, first",
        first("critic/mc_explained_variance"),
        "the same with Monte-Carlo returns for targets, which critics of different λ share",
    ),
    "mc_explained_variance_early": Outcome(
        "explained variance of Monte-Carlo returns, iterations 2 to 4",
        after_first("critic/mc_explained_variance"),
        "mean over iterations 2 to 4",
    ),
    "mc_explained_variance_last": Outcome(
        "explained variance of Monte-Carlo returns, last",
        last("critic/mc_explained_variance"),
        "mean over the last 3 iterations",
    ),
    "mc_error_last": Outcome(
        "squared error of values against Monte-Carlo returns, last",
        last("critic/mc_error"),
        "mean over tokens and the last 3 iterations",
    ),
    "value_first_token": Outcome(
        "V(first token), first iteration",
        first("critic/value_first_token"),
        "mean value of the first token of a response; below the worst reward is impossible",
    ),
    "give_up_advantage": Outcome(
        "give-up advantage, first iteration, σ",
        first("actor/give_up_advantage_sigma"),
        "mean advantage of the tokens with which the actor ends its thinking before it is done, above the mean "
        "advantage, in standard deviations of all advantages; positive: PPO will end responses earlier",
    ),
    "position_correlation": Outcome(
        "correlation of advantage and position, first iteration",
        first("actor/advantage_position_correlation"),
        "of a token's advantage with its position in the response",
    ),
    "early_late_gap": Outcome(
        "early minus late advantage, first iteration",
        first("actor/advantage_early_late_gap"),
        "mean advantage of the first fifth of a response minus that of the last fifth",
    ),
    "advantage_variance": Outcome(
        "variance of the advantages",
        advantage_variance,
        "of the advantages before whitening, mean over iterations",
    ),
    "pretrain_loss_first": Outcome(
        "pretraining: value loss, first",
        first("critic/value_loss", "value_pretrain"),
        "of the first step of value pretraining",
    ),
    "pretrain_loss_last": Outcome(
        "pretraining: value loss, last",
        last("critic/value_loss", "value_pretrain", 10),
        "mean over its last 10 steps",
    ),
    "pretrain_explained_variance": Outcome(
        "pretraining: explained variance, last",
        last("critic/explained_variance", "value_pretrain", 10),
        "mean over its last 10 steps",
    ),
}
"""By the name that an experiment file uses."""


def outcome_rows() -> list[dict[str, str]]:
    """The table of docs/experiments.md."""
    return [
        {"in a file": f"`{name}`", "column": outcome.label, "what it is": outcome.text}
        for name, outcome in OUTCOMES.items()
    ]


def outcome_of(name: str, run: RunData) -> float | None:
    """One outcome of a run, a finite number or None."""
    value = OUTCOMES[name].of(run)
    return value if value is not None and abs(value) < float("inf") else None
