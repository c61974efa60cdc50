"""pass@k and avg@k of what the engines hold, on held-out problems."""

from collections import defaultdict
from typing import Any

from megatron_vcppo.algo.pass_at_k import avg_at_k, pass_at_k
from megatron_vcppo.config import Config
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rollout.messages import Sampling
from megatron_vcppo.stages.rollout_session import BatchNumber, RolloutSession


def evaluate_engines(config: Config, session: RolloutSession, iteration: int) -> dict[str, float]:
    """Metrics ``evaluation/…`` over prompts.test under the pushed weights; collective."""
    number = BatchNumber.evaluation(iteration)
    rollouts = evaluation_rollouts(config, session, number)
    session.forget(number)
    return evaluation_metrics(rollouts, config.evaluate.k)


def evaluation_prompts(config: Config, session: RolloutSession) -> list[Prompt]:
    """The held-out problems."""
    assert config.prompts.test is not None, "checked with the configuration"
    return session.prompts(config.prompts.test)[: config.evaluate.num_prompts]


def evaluation_rollouts(config: Config, session: RolloutSession, number: BatchNumber) -> list[Rollout]:
    """Scored responses to the held-out problems."""
    sampling = Sampling(config.evaluate.temperature, config.evaluate.top_p)
    return session.generate(evaluation_prompts(config, session), number, sampling, config.evaluate.num_samples)


def evaluation_metrics(rollouts: list[Rollout], ks: list[int]) -> dict[str, float]:
    """``scores`` as flat metrics: evaluation/avg, evaluation/pass@8, …, and by task evaluation/TASK/avg, …"""
    found = scores(rollouts, ks)
    parts = {"evaluation": found} | {f"evaluation/{task}": part for task, part in found["tasks"].items()}
    metrics: dict[str, float] = {}
    for prefix, part in parts.items():
        metrics |= {f"{prefix}/{name}": part[name] for name in part if name not in ("pass", "tasks")}
        for k, (estimate, half_width) in part["pass"].items():
            metrics |= {f"{prefix}/pass@{k}": estimate, f"{prefix}/pass@{k}_interval": half_width}
    return metrics


def scores(rollouts: list[Rollout], ks: list[int]) -> dict[str, Any]:
    """avg@n and pass@k with the half widths of their 95 % intervals, mean length, share truncated at the limit.

    Example: ``{"avg": 0.5, "avg_interval": 0.1, "length_mean": 9.0, "truncated_share": 0.0, "pass": {"4": [0.7, 0.1]},
    "tasks": {…}}``; ``tasks`` holds the same by task, and is empty if there is one task only.
    """
    correct: dict[str, list[bool]] = defaultdict(list)
    by_task: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        correct[rollout.prompt.prompt_id].append(rollout.is_correct)
        by_task[rollout.prompt.task].append(rollout)
    results = list(correct.values())
    mean, half_width = avg_at_k(results)
    return {
        "avg": mean,
        "avg_interval": half_width,
        "length_mean": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "truncated_share": sum(r.truncated for r in rollouts) / len(rollouts),
        "pass": {str(k): list(pass_at_k(results, k)) for k in ks},
        "tasks": {task: scores(part, ks) for task, part in by_task.items()} if len(by_task) > 1 else {},
    }
