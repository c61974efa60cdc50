"""pass@k and avg@k of what the engines hold, on held-out problems."""

from collections import defaultdict

from megatron_vcppo.algo.estimators import avg_at_k, pass_at_k
from megatron_vcppo.config import Config
from megatron_vcppo.records import Rollout
from megatron_vcppo.rollout.wire import Sampling
from megatron_vcppo.stages.generation import Generation


def evaluate_engines(config: Config, generation: Generation, iteration: int) -> dict[str, float]:
    """Metrics ``evaluation/…`` over prompts.test under the pushed weights; collective."""
    return evaluation_metrics(evaluation_rollouts(config, generation, iteration), config.evaluate.k)


def evaluation_rollouts(config: Config, generation: Generation, iteration: int) -> list[Rollout]:
    """Scored responses to the held-out problems; their seeds never meet those of training."""
    settings = config.evaluate
    assert config.prompts.test is not None, "checked with the configuration"
    prompts = generation.prompts(config.prompts.test)[: settings.num_prompts]
    sampling = Sampling(settings.temperature, settings.top_p)
    return generation.generate(prompts, -1 - iteration, sampling, settings.num_samples)


def evaluation_metrics(rollouts: list[Rollout], ks: list[int]) -> dict[str, float]:
    """avg@n with its interval, pass@k, length and truncation, over all and by task."""
    num_correct: dict[str, list[bool]] = defaultdict(list)
    for rollout in rollouts:
        assert rollout.reward is not None
        num_correct[rollout.prompt.prompt_id].append(rollout.reward > 0)
    results = list(num_correct.values())
    mean, half_width = avg_at_k(results)
    metrics = {
        "evaluation/avg": mean,
        "evaluation/avg_interval": half_width,
        "evaluation/length_mean": sum(len(r.response_ids) for r in rollouts) / len(rollouts),
        "evaluation/truncated_share": sum(r.truncated for r in rollouts) / len(rollouts),
    }
    for k in ks:
        estimate, half_width = pass_at_k(results, k)
        metrics |= {f"evaluation/pass@{k}": estimate, f"evaluation/pass@{k}_interval": half_width}
    return metrics
