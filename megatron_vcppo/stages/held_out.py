"""avg@n, pass@k and maj@k of what the engines hold, on held-out problems."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vcppo.algo.pass_at_k import Estimate, avg_at_n, maj_at_k, pass_at_k
from megatron_vcppo.config import Config
from megatron_vcppo.mcore.row_exchange import values_of_leaders
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.rewards.verifier import Verifier
from megatron_vcppo.rewards.votes import answer_reader
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.stages.rollout_session import BatchNumber, RolloutSession


@dataclass(frozen=True)
class Outcome:
    """What the scores read of a response."""

    problem: str
    task: str
    is_correct: bool
    truncated: bool
    num_tokens: int
    answer: str | None
    """For majorities; None also where the response has no answer, or its task none to count (``answer_reader``)."""


def evaluate_engines(config: Config, session: RolloutSession, iteration: int) -> dict[str, float]:
    """Metrics ``evaluation/…`` over prompts.test under the pushed weights; collective."""
    number = BatchNumber.evaluation(iteration)
    part = evaluation_rollouts(config, session, number)
    session.batches.forget(number.storage)
    return evaluation_metrics(gather_outcomes(part, session, config.evaluate.k), config.evaluate.k, session.verifiers)


def evaluation_prompts(config: Config, session: RolloutSession) -> list[Prompt]:
    """The held-out problems."""
    assert config.prompts.test is not None, "checked with the configuration"
    return session.prompts(config.prompts.test)[: config.evaluate.num_prompts]


def evaluation_rollouts(config: Config, session: RolloutSession, number: BatchNumber) -> RolloutPart:
    """Scored responses to the held-out problems."""
    sampling = Sampling(config.evaluate.temperature, config.evaluate.top_p)
    return session.generate(evaluation_prompts(config, session), number, sampling, config.evaluate.num_samples)


def gather_outcomes(part: RolloutPart, session: RolloutSession, ks: list[int]) -> list[Outcome]:
    """Of all leaders' responses, in their order, on every rank; collective."""
    mine = [*zip(part.places, outcomes_of(part.rollouts, session.verifiers, ks), strict=True)]
    parts = values_of_leaders(mine, list[tuple[int, Outcome]])
    return [outcome for _, outcome in sorted((one for found in parts for one in found), key=lambda one: one[0])]


def outcomes_of(rollouts: Sequence[Rollout], verifiers: Mapping[str, Verifier], ks: list[int]) -> list[Outcome]:
    """Answers are read only if there is a k above 1, for majorities.

    As for the reward, a truncated response has no answer; that of a correct one is known.
    """
    tasks = {rollout.prompt.task for rollout in rollouts} if max(ks, default=1) > 1 else set()
    readers = {task: answer_reader(verifiers.get(task)) for task in tasks}

    def answer(rollout: Rollout) -> str | None:
        reader = readers.get(rollout.prompt.task)
        if reader is None or rollout.truncated or rollout.is_correct:
            return None
        return reader(rollout.prompt, rollout.response_text)

    return [
        Outcome(r.prompt.prompt_id, r.prompt.task, r.is_correct, r.truncated, len(r.response_ids), answer(r))
        for r in rollouts
    ]


def evaluation_metrics(outcomes: list[Outcome], ks: list[int], verifiers: Mapping[str, Verifier]) -> dict[str, float]:
    """``scores`` as flat metrics: evaluation/avg, evaluation/pass@8, …, and by task evaluation/TASK/avg, …"""
    found = scores(outcomes, ks, verifiers)
    parts = {"evaluation": found} | {f"evaluation/{task}": part for task, part in found["tasks"].items()}
    metrics: dict[str, float] = {}
    for prefix, part in parts.items():
        metrics |= {f"{prefix}/{name}": value for name, value in part.items() if isinstance(value, float)}
        for kind in ("pass", "maj"):
            for k, (estimate, half_width, *_) in part[kind].items():
                metrics |= {f"{prefix}/{kind}@{k}": estimate, f"{prefix}/{kind}@{k}_interval": half_width}
    return metrics


def scores(outcomes: list[Outcome], ks: list[int], verifiers: Mapping[str, Verifier]) -> dict[str, Any]:
    """avg@n, pass@k and maj@k with their 95 % intervals, mean length, share truncated at the limit.

    Example: ``{"avg": 0.5, "avg_interval": 0.1, "avg_range": [0.4, 0.6], "length_mean": 9.0, "truncated_share": 0.0,
    "pass": {"4": [0.7, 0.1, 0.6, 0.8]}, "maj": {"4": [0.6, 0.1, 0.5, 0.7]}, "tasks": {…}}``: estimate, half width, low
    and high end. ``maj`` has the k above 1, and is empty if a task has no answers to count (``answer_reader``);
    ``tasks`` holds the same by task, and is empty if there is one task only.
    """
    by_problem: dict[str, list[Outcome]] = defaultdict(list)
    by_task: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_problem[outcome.problem].append(outcome)
        by_task[outcome.task].append(outcome)
    problems = list(by_problem.values())
    results = [[outcome.is_correct for outcome in samples] for samples in problems]
    answers = [[outcome.answer for outcome in samples] for samples in problems]
    avg = avg_at_n(results)
    has_answers = all(answer_reader(verifiers.get(task)) is not None for task in by_task)
    return {
        "avg": avg.value,
        "avg_interval": avg.half_width,
        "avg_range": [avg.low, avg.high],
        "length_mean": sum(outcome.num_tokens for outcome in outcomes) / len(outcomes),
        "truncated_share": sum(outcome.truncated for outcome in outcomes) / len(outcomes),
        "pass": {str(k): _numbers(pass_at_k(results, k)) for k in ks},
        "maj": {str(k): _numbers(maj_at_k(results, answers, k)) for k in ks if k > 1} if has_answers else {},
        "tasks": {task: scores(part, ks, verifiers) for task, part in by_task.items()} if len(by_task) > 1 else {},
    }


def _numbers(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.half_width, estimate.low, estimate.high]
