"""What an engine has room for, and how fast it generates. Pure."""

from dataclasses import dataclass

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import engine_nodes
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.integers import ceil_div
from megatron_vcppo.launch.memory_plan import GIB, WEIGHT_BYTES

WORKING_GIB = 2.0
"""Activations, captured graphs and buffers of an engine worker."""


@dataclass(frozen=True)
class EngineEstimate:
    """All engines of a stage."""

    engines: int
    """Replicas that generate: with rollout.engine.dp each replica inside an engine."""
    cache_gib: float
    """Room for the KV cache on each worker; below 0: the weights do not fit."""
    cache_tokens: int
    """Tokens of all responses together that a replica holds at a time."""
    concurrency: int
    """Responses that a replica generates at a time, at their mean length."""


def response_tokens(config: Config) -> int:
    """Mean length of a response."""
    return min(config.hardware.response_tokens or config.rollout.max_tokens, config.rollout.max_tokens)


def estimate_engines(arch: Architecture, config: Config) -> EngineEstimate:
    """Room and concurrency. Without GPUs the cache is rollout.engine.cpu_cache_gib."""
    engine, cluster = config.rollout.engine, config.cluster
    size = WEIGHT_BYTES[engine.dtype or config.model.dtype]
    cache_gib = float(engine.cpu_cache_gib)
    if cluster.gpus_per_node:
        weights = arch.parameter_count() * size / engine.tp / GIB
        cache_gib = engine.gpu_memory_utilization * (cluster.gpu_memory_gib or 80.0) - weights - WORKING_GIB
    tokens = max(0, int(cache_gib * GIB / cache_bytes(arch, config)))
    # A response is on average half done.
    length = config.hardware.prompt_tokens + response_tokens(config) / 2
    return EngineEstimate(
        engines=engine_nodes(config) * engine.per_node * engine.dp,
        cache_gib=cache_gib,
        cache_tokens=tokens,
        concurrency=min(engine.max_num_seqs, int(tokens / length)),
    )


def cache_bytes(arch: Architecture, config: Config) -> float:
    """KV cache of one token on one worker."""
    engine = config.rollout.engine
    heads = max(1.0, arch.num_kv_heads / engine.tp)
    return 2 * arch.num_layers * heads * arch.head_dim * WEIGHT_BYTES[engine.dtype or config.model.dtype]


def generation_s(arch: Architecture, config: Config, num_responses: int, window: int | None = None) -> float:
    """Seconds to generate so many responses; inf if there is no room for one.

    Steps of a full batch until all tokens but those of the longest response are there; then steps of that one alone.
    window: the most tokens that each gets (ppo.window_tokens), after which others go on from where it is; default: all.
    """
    hardware, found = config.hardware, estimate_engines(arch, config)
    share = ceil_div(num_responses, found.engines)
    batch = min(found.concurrency, share)
    if not batch:
        return float("inf")
    length, longest = response_tokens(config), hardware.longest_tokens or config.rollout.max_tokens
    window = window or config.rollout.max_tokens
    new = length / ceil_div(length, window)
    steps = new * share / batch
    tail = max(0.0, min(longest, window) - steps)
    before = round((length - new) / 2)  # of a response, generated in windows before, and prefilled again
    prefill = share * arch.training_flops([hardware.prompt_tokens + before]) / 3 / config.rollout.engine.tp
    prefill_s = prefill / (hardware.tflops * 1e12 * hardware.mfu)
    return prefill_s + steps * step_s(arch, config, batch) + tail * step_s(arch, config, 1)


def parameters_read(arch: Architecture, batch: int) -> float:
    """Parameters that a step over so many tokens reads: of experts those that a token is expected to choose."""
    if arch.experts is None:
        return arch.parameter_count()
    unread = (1 - arch.experts.per_token / arch.experts.count) ** batch
    return arch.parameter_count() - unread * arch.expert_parameter_count()


def step_s(arch: Architecture, config: Config, batch: int) -> float:
    """Seconds of an engine's step: it reads the weights and the cache of what runs, or computes its products, whichever
    takes longer, and has a fixed part (hardware.step_ms)."""
    engine, hardware = config.rollout.engine, config.hardware
    length = hardware.prompt_tokens + response_tokens(config) / 2
    weights = parameters_read(arch, batch) * WEIGHT_BYTES[engine.dtype or config.model.dtype] / engine.tp
    num_bytes = weights + batch * length * cache_bytes(arch, config)
    flops = batch * arch.training_flops([1]) / 3 / engine.tp
    read_s = num_bytes / (hardware.memory_gb_per_s * 1e9 * hardware.memory_share)
    return hardware.step_ms / 1e3 + max(read_s, flops / (hardware.tflops * 1e12 * hardware.mfu))
