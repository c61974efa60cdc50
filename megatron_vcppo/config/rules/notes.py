"""Values that cannot do what they are for, which a run would only show hours later.

No reason to refuse it: runs that have such values must resume. ``load_config`` passes each line to its ``note``.
"""

from collections.abc import Iterator

from megatron_vcppo.config.schema import Config

EVERY_STAGE = ("time", "speed", "stopping")
METRIC_GROUPS = {
    "sft": ("sft",),
    "reward_model": ("reward_model",),
    "value_pretrain": ("critic", "rollout", "model_reward"),
    "ppo": ("actor", "critic", "rollout", "model_reward", "packing", "weight_sync", "evaluation"),
}
"""Stage: what the names of its metrics begin with, besides EVERY_STAGE."""
EVALUATION_METRICS = ("avg", "avg_interval", "length_mean", "truncated_share")
"""What the names below evaluation/ end with, besides pass@k and maj@k."""


def notes(config: Config) -> Iterator[str]:
    """One line per value; config: checked."""
    yield from unwritten_metrics(config)
    yield from export_after_the_end(config)
    window, longest = config.ppo.window_tokens, config.rollout.max_tokens
    if "ppo" in config.stages and window is not None and window > longest:
        yield f"ppo.window_tokens {window} is more than rollout.max_tokens {longest}: every response is whole"


def unwritten_metrics(config: Config) -> Iterator[str]:
    """Best checkpoints by a metric that their stage does not write."""
    for stage in METRIC_GROUPS:
        metric = getattr(config, stage).checkpoint.keep_best.metric
        if stage in config.stages and metric is not None and not may_be_written(config, stage, metric):
            yield (
                f"{stage}.checkpoint.keep_best.metric {metric} is not a metric that {stage} writes: no checkpoint will "
                "be kept as the best"
            )


def may_be_written(config: Config, stage: str, metric: str) -> bool:
    """False only if it is certain that the stage does not write this metric."""
    group, _, name = metric.partition("/")
    if group not in (*EVERY_STAGE, *METRIC_GROUPS[stage]):
        return False
    if group == "sft" and name.startswith("validation_"):
        return config.sft.validation is not None
    if group == "evaluation":  # evaluation/NAME, evaluation/TASK/NAME
        estimates = [f"{kind}@{k}" for k in config.evaluate.k for kind in ("pass", "maj") if kind == "pass" or k > 1]
        known = (*EVALUATION_METRICS, *estimates, *(f"{estimate}_interval" for estimate in estimates))
        return name.rpartition("/")[2] in known
    return True


def export_after_the_end(config: Config) -> Iterator[str]:
    """An export of an iteration that its stage does not reach."""
    number = config.export.checkpoint.partition("_")[2]
    if "export" not in config.stages or not number:  # last or best
        return
    before = config.stages[: config.stages.index("export")]
    source = next(stage for stage in reversed(before) if stage in ("sft", "ppo"))
    key, last = ("ppo.iterations", config.ppo.iterations) if source == "ppo" else ("sft.steps", config.sft.steps)
    if last is not None and int(number) > last:
        yield f"export.checkpoint {config.export.checkpoint} is after the last one: {key} is {last}"
