"""What types cannot say: ranges, and keys that must fit each other. Every message carries the numbers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from megatron_vcppo.config.cluster_checks import check_cluster
from megatron_vcppo.config.placement import check_placement, trainer_gpus_per_node
from megatron_vcppo.config.rl_checks import check_rl
from megatron_vcppo.config.schema import Config
from megatron_vcppo.errors import UserError

POSITIVE = {
    "epochs", "steps", "batch_size", "save_every", "max_length", "tokens_per_microbatch", "tp", "pp", "cp", "dp",
    "timeout_s", "eps", "init_std", "trainer_nodes", "trainer_ranks", "cpus_per_node", "time_limit_minutes",
    "num_prompts", "num_samples", "max_tokens", "stored_rollouts", "stable_window", "iterations", "minibatches",
    "prompts_per_iteration", "ppo_epochs", "updates_per_actor_update", "dynamic_sampling_rounds", "skip_limit",
    "verify_timeout_s", "verify_workers", "per_node", "max_num_seqs", "bucket_mib", "kl_horizon",
    "length_adaptive_alpha", "tis_cap", "huber_delta", "value_clip", "clip_low", "clip_high", "kl_target",
    "start_timeout_s", "health_timeout_s", "request_timeout_s", "all_dead_timeout_s", "cpu_cache_gib", "gpu_memory_gib",
    "memory_per_node_gb", "link_gb_per_s", "turn_timeout_s", "memory_mib",
}  # fmt: skip
"""Last parts of keys whose value, where there is one, must be over zero."""
NOT_NEGATIVE = {
    "seed", "lr", "weight_decay", "clip_grad", "warmup_steps", "keep_last", "validate_every", "rollout_nodes",
    "gpus_per_node", "save_margin_s", "critic_only_iterations", "evaluate_every", "overlong_penalty_tokens", "kl_coef",
    "entropy_coef", "positive_lm_coef", "stable_tolerance", "temperature", "top_k", "max_restarts", "rollout_restarts",
    "crash_retries", "stop_grace_s",
}  # fmt: skip
FRACTIONS = {
    "min_lr_ratio", "lam_actor", "lam_critic", "gamma", "cut_share", "label_smoothing", "top_p",
    "gpu_memory_utilization",
}  # fmt: skip
BELOW_ONE = {"beta1", "beta2"}
READ_BY = {"sft": {"sft"}, "prompts": {"reward_model", "value_pretrain", "ppo"}}
"""Sections whose required keys count only if one of these stages is in the chain."""


def check_config(config: Config, complete: bool = True) -> None:
    """Raise UserError with every problem found; a part of a configuration (not ``complete``) has only its ranges."""
    checks = [missing_keys, *CHECKS] if complete else [_check_ranges]
    problems = [problem for check in checks for problem in check(config)]
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  {p}" for p in problems))


def missing_keys(config: Config) -> Iterator[str]:
    """One line per required key that is not set and that a stage of this chain reads."""
    for name, value in leaves(config):
        readers = READ_BY.get(name.split(".")[0], config.stages)
        if value == MISSING and not set(readers).isdisjoint(config.stages):
            yield f"{name} is required: set it in the file or on the command line ({name}=…)"


def trainer_ranks(config: Config) -> int:
    """Ranks of the trainer over all its nodes; UserError when they do not fit the parallel sizes."""
    problems = list(_check_layout(config))
    if problems:
        raise UserError("; ".join(problems))
    return _num_ranks(config)


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every key."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _check_ranges(config: Config) -> Iterator[str]:
    for name, value in leaves(config):
        last = name.rpartition(".")[2]
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            yield f"{name} must be finite, got {value}"
            continue
        if last in POSITIVE and not value > 0:
            yield f"{name} must be over 0, got {value}"
        if last in NOT_NEGATIVE and not value >= 0:
            yield f"{name} must not be negative, got {value}"
        if last in BELOW_ONE and not 0 <= value < 1:
            yield f"{name} must lie in 0 … 1, 1 left out, got {value}"
        if last in FRACTIONS and not 0 <= value <= 1:
            yield f"{name} must lie in 0 … 1, got {value}"


def _num_ranks(config: Config) -> int:
    cluster, parallel = config.cluster, config.parallel
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if cluster.trainer_ranks is None and cluster.gpus_per_node:
        return cluster.trainer_nodes * max(1, trainer_gpus_per_node(config))
    return cluster.trainer_ranks or model_ranks * (parallel.dp or 1)


def _check_layout(config: Config) -> Iterator[str]:
    parallel, nodes = config.parallel, config.cluster.trainer_nodes
    if min(parallel.tp, parallel.pp, parallel.cp, nodes, parallel.dp or 1) < 1:
        return  # the ranges say it
    if config.cluster.trainer_ranks is None and trainer_gpus_per_node(config) < bool(config.cluster.gpus_per_node):
        return  # the placement says it
    sizes = f"tp {parallel.tp} × pp {parallel.pp} × cp {parallel.cp}"
    model_ranks, ranks = parallel.tp * parallel.pp * parallel.cp, _num_ranks(config)
    if ranks % model_ranks:
        yield f"parallel: {sizes} × dp must divide {ranks} ranks; {model_ranks} does not"
    elif parallel.dp and ranks != model_ranks * parallel.dp:
        wanted = model_ranks * parallel.dp
        yield f"parallel: {sizes} × dp {parallel.dp} needs {wanted} ranks, the cluster section has {ranks}"
    if ranks % nodes:
        yield f"cluster: {ranks} trainer ranks do not divide over trainer_nodes {nodes}"
    tokens, least = parallel.tokens_per_microbatch, 2 * parallel.cp * parallel.tp
    if parallel.cp > 1 and tokens < least:
        yield (
            f"parallel.tokens_per_microbatch {tokens} is under 2 × cp {parallel.cp} × tp {parallel.tp} = {least}, to "
            "which sequences are padded"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel needs parallel.tp over 1, got 1"


def _check_stages(config: Config) -> Iterator[str]:
    if not config.stages:
        yield "stages is empty: nothing to do"
    for stage in dict.fromkeys(config.stages):
        if config.stages.count(stage) > 1:
            yield f"stages: {stage} is named {config.stages.count(stage)} times"


def _check_fp8(config: Config) -> Iterator[str]:
    model, cluster = config.model, config.cluster
    if model.fp8 == "off":
        return
    if model.dtype != "bfloat16":
        yield f"model.fp8 {model.fp8} needs model.dtype bfloat16, got {model.dtype}"
    if model.layers == "torch":
        yield f"model.fp8 {model.fp8} needs Transformer Engine's layers, but model.layers is torch"
    if cluster.gpus_per_node == 0:
        yield f"model.fp8 {model.fp8} needs GPUs, but cluster.gpus_per_node is 0: set model.fp8=off"


def _check_schedule(config: Config) -> Iterator[str]:
    sft = config.sft
    if sft.steps is not None and sft.schedule.warmup_steps > sft.steps:
        yield f"sft.schedule.warmup_steps {sft.schedule.warmup_steps} is more than sft.steps {sft.steps}"


def _check_secrets(config: Config) -> Iterator[str]:
    for name in config.cluster.environment:
        if any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            yield (
                f"cluster.environment.{name} looks like a secret, and configurations are stored where others can read "
                f"them: export {name} in the shell that submits"
            )


CHECKS: list[Callable[[Config], Iterator[str]]] = [
    _check_ranges,
    _check_layout,
    check_placement,
    check_cluster,
    _check_stages,
    _check_fp8,
    _check_schedule,
    _check_secrets,
    check_rl,
]
"""Each yields one line per problem; an area adds its own here."""
