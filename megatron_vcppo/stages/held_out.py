"""avg@n, pass@k and maj@k of what the engines hold, on held-out problems."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from megatron_vcppo.algo.pass_at_k import Estimate, avg_at_n, maj_at_k, pass_at_k
from megatron_vcppo.config import Config
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.verifier import Verifier
from megatron_vcppo.rewards.votes import answer_reader
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.stages.rollout_session import BatchNumber, RolloutSession


def evaluate_engines(config: Config, session: RolloutSession, iteration: int) -> dict[str, float]:
    """Metrics ``evaluation/…`` over prompts.test under the pushed weights; collective."""
    number = BatchNumber.evaluation(iteration)
    rollouts = evaluation_rollouts(config, session, number)
    session.forget(number)
    return evaluation_metrics(rollouts, config.evaluate.k, session.verifiers)


def evaluation_prompts(config: Config, session: RolloutSession) -> list[Prompt]:
    """The held-out problems."""
    assert config.prompts.test is not None, "checked with the configuration"
    return session.prompts(config.prompts.test)[: config.evaluate.num_prompts]


def evaluation_rollouts(config: Config, session: RolloutSession, number: BatchNumber) -> list[Rollout]:
    """Scored responses to the held-out problems."""
    sampling = Sampling(config.evaluate.temperature, config.evaluate.top_p)
    return session.generate(evaluation_prompts(config, session), number, sampling, config.evaluate.num_samples)


def evaluation_metrics(rollouts: list[Rollout], ks: list[int], verifiers: Mapping[str, Verifier]) -> dict[str, float]:
    """``scores`` as flat metrics: evaluation/avg, evaluation/pass@8, …, and by task evaluation/TASK/avg, …"""
    found = scores(rollouts, ks, verifiers)
    parts = {"evaluation": found} | {f"evaluation/{task}": part for task, part in found["tasks"].items()}
    metrics: dict[str, float] = {}
    for prefix, part in parts.items():
        metrics |= {f"{prefix}/{name}": value for name, value in part.items() if isinstance(value, float)}
        for kind in ("pass", "maj"):
            for k, (estimate, half_width, *_) in part[kind].items():
                metrics |= {f"{prefix}/{kind}@{k}": estimate, f"{prefix}/{kind}@{k}_interval": half_width}
    return metrics


def scores(rollouts: list[Rollout], ks: list[int], verifiers: Mapping[str, Verifier]) -> dict[str, Any]:
    """avg@n, pass@k and maj@k with their 95 % intervals, mean length, share truncated at the limit.

    Example: ``{"avg": 0.5, "avg_interval": 0.1, "avg_range": [0.4, 0.6], "length_mean": 9.0, "truncated_share": 0.0,
    "pass": {"4": [0.7, 0.1, 0.6, 0.8]}, "maj": {"4": [0.6, 0.1, 0.5, 0.7]}, "tasks": {…}}``: estimate, half width, low
    and high end. ``maj`` has the k above 1, and is empty if a task has no answers to count (``answer_reader``);
    ``tasks`` holds the same by task, and is empty if there is one task only.
    """
    by_problem: dict[str, list[Rollout]] = defaultdict(list)
    by_task: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_problem[rollout.prompt.prompt_id].append(rollout)
        by_task[rollout.prompt.task].append(rollout)
    problems = list(by_problem.values())
    results = [[rollout.is_correct for rollout in samples] for samples in problems]
    avg = avg_at_n(results)
    return {
        "avg": avg.value,
        "avg_interval": avg.half_width,
        "avg_range": [avg.low, avg.high],
        "length_mean": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "truncated_share": sum(r.truncated for r in rollouts) / len(rollouts),
        "pass": {str(k): _numbers(pass_at_k(results, k)) for k in ks},
        "maj": _majorities(problems, results, [k for k in ks if k > 1], verifiers),
        "tasks": {task: scores(part, ks, verifiers) for task, part in by_task.items()} if len(by_task) > 1 else {},
    }


def _majorities(
    problems: list[list[Rollout]], results: list[list[bool]], ks: list[int], verifiers: Mapping[str, Verifier]
) -> dict[str, list[float]]:
    readers = {samples[0].prompt.task: answer_reader(verifiers.get(samples[0].prompt.task)) for samples in problems}
    if not ks or None in readers.values():
        return {}

    def answer(rollout: Rollout) -> str | None:
        reader = readers[rollout.prompt.task]
        # As for the reward, a truncated response has no answer; that of a correct one is known.
        if reader is None or rollout.truncated or rollout.is_correct:
            return None
        return reader(rollout.prompt, rollout.response_text)

    answers = [[answer(rollout) for rollout in samples] for samples in problems]
    return {str(k): _numbers(maj_at_k(results, answers, k)) for k in ks}


def _numbers(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.half_width, estimate.low, estimate.high]
