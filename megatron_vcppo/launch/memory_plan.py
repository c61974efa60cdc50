"""The memory plan: what the fullest trainer rank will hold in a stage, estimated before anything is queued.

``tools/bench.py memory`` compares it with what ranks of several layouts hold; docs/slurm.md has the figures.
"""

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import ENGINE_STAGES, engine_placement, trainer_ranks
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.frozen import frozen_counts, frozen_patterns
from megatron_vcppo.hf.reward_model import reward_architecture, uses_reward_model

GIB = 1 << 30
WEIGHT_BYTES = {"bfloat16": 2, "float32": 4}
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"bfloat16": 12, "float32": 8}
"""Adam's two moments in float32, and a float32 copy of bfloat16 weights."""
OVERHEAD_GIB = 3.0
"""CUDA context, communication buffers, fragmentation."""
ASLEEP_GIB = 2.0
"""What a sleeping engine keeps of its GPU: CUDA context, communication buffers, captured graphs."""


def models_of(config: Config, stage: str) -> tuple[list[str], list[str]]:
    """Kinds of the models that a stage trains, and of those that it only runs or pushes to the engines."""
    ppo = config.ppo
    if stage == "ppo":
        trained = ["actor", "critic"] if ppo.advantage.baseline == "critic" else ["actor"]
        return trained, ["actor"] if ppo.loss.kl_coef else []
    return {
        "sft": (["actor"], []),
        "reward_model": (["critic"], ["actor"]),
        "value_pretrain": (["critic"], ["actor"]),
        "evaluate": ([], ["actor"]),
    }.get(stage, ([], []))


def parameters_of(arch: Architecture, config: Config, kind: str, pp_rank: int) -> float:
    """Parameters of a model on one rank: its layers, the embedding on the first pipeline stage, the output on the last.

    A tied output layer is a second copy where the last stage is not the first; a critic has none.
    """
    tp, pp = config.parallel.tp, config.parallel.pp
    vocabulary = arch.vocab_size * arch.hidden_size
    layers = arch.parameter_count() - vocabulary * (1 if arch.tied else 2)
    count = layers / pp
    if pp_rank == 0:
        count += vocabulary
    if pp_rank == pp - 1 and kind == "actor" and (pp > 1 or not arch.tied):
        count += vocabulary
    return count / tp


def frozen_parameters(arch: Architecture, config: Config, stage: str) -> tuple[int, int]:
    """Parameters of the stage's critic that are not trained (``ppo.critic.frozen``): (of all layers, of the embedding).

    Raises UserError if the patterns do not fit the model.
    """
    if "critic" not in models_of(config, stage)[0]:
        return 0, 0
    key, patterns = frozen_patterns(config, stage)
    return frozen_counts(arch, patterns, key, config.parallel.pp)


def layer_activations(arch: Architecture, config: Config) -> tuple[float, float]:
    """(input, everything) that one layer keeps for its backward pass: elements per token on one rank.

    Attention keeps its projection's output, the rotated queries and keys, its own output and the copy that the next
    projection reads. Each norm keeps its input and output, the gated MLP both halves and their product. Where torch's
    own operations take the place of Transformer Engine's kernels, each norm keeps one tensor more, the MLP two.
    """
    parallel = config.parallel
    norms, mlp = (4, 3) if config.cluster.gpus_per_node else (6, 5)
    hidden = arch.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
    inside = 4 * arch.q_size + 3 * arch.kv_size + mlp * arch.ffn_size
    return hidden, norms * hidden + inside / parallel.tp


def plan(arch: Architecture, config: Config, stage: str) -> dict[str, float]:
    """GiB per part on the fullest rank."""
    parts = [plan_of_rank(arch, config, stage, pp_rank) for pp_rank in range(config.parallel.pp)]
    return max(parts, key=lambda part: sum(part.values()))


def plan_of_rank(arch: Architecture, config: Config, stage: str, pp_rank: int) -> dict[str, float]:
    """One pipeline stage's parts. The first one holds as many micro-batches at once as there are stages, the last 1.

    Of frozen parameters there are only weights. Not counted: the keys and values that context parallelism gathers in
    each layer without Transformer Engine, where nothing is recomputed.
    """
    parallel, dtype = config.parallel, config.model.dtype
    trained, frozen = models_of(config, stage)
    sharing = trainer_ranks(config) // (parallel.tp * parallel.pp) if parallel.distributed_optimizer else 1
    owned = sum(parameters_of(arch, config, kind, pp_rank) for kind in trained)
    layers_frozen, embedding_frozen = frozen_parameters(arch, config, stage)
    learned = owned - (layers_frozen / parallel.pp + (embedding_frozen if pp_rank == 0 else 0)) / parallel.tp
    held = owned + sum(parameters_of(arch, config, kind, pp_rank) for kind in frozen)
    if uses_reward_model(config, stage):
        held += parameters_of(reward_architecture(config, arch), config, "critic", pp_rank)
    size = WEIGHT_BYTES[dtype]
    tokens = max(parallel.tokens_per_microbatch, config.model.max_length) / parallel.cp
    layers, at_once = arch.num_layers / parallel.pp, parallel.pp - pp_rank
    given, kept = layer_activations(arch, config)
    # Logits and their gradient; then that gradient and the one of the output layer, in the weights' type.
    logits = max(2 * tokens, tokens + arch.hidden_size) * arch.vocab_size / parallel.tp
    if "actor" not in trained or pp_rank < parallel.pp - 1:
        logits = 0.0
    activations = kept * layers * at_once * tokens
    if parallel.recompute == "full":  # the layer that is recomputed comes after the logits
        activations = given * layers * at_once * tokens + max(0.0, kept * tokens - logits)
    sizes = {
        "weights": held * size,
        "gradients": learned * GRADIENT_BYTES,
        "optimizer": learned * OPTIMIZER_BYTES[dtype] / sharing,
        "activations": activations * size if trained else 0.0,
        "logits": logits * size,
        "overhead": OVERHEAD_GIB * GIB,
    }
    if config.model.fp8 != "off":  # of layers that run; those of trained models as they are and transposed
        run = 2 * len(trained) + (len(frozen) if stage == "ppo" else 0)
        vocabulary = arch.vocab_size * arch.hidden_size * (1 if arch.tied else 2)
        sizes["8-bit weights"] = run * (arch.parameter_count() - vocabulary) / parallel.pp / parallel.tp
    return {name: num_bytes / GIB for name, num_bytes in sizes.items()}


def check_generation_memory(
    arch: Architecture, config: Config, stage: str, parts: dict[str, float], gpu_gib: float
) -> None:
    """UserError if engines on the trainer's GPUs do not fit next to what the trainer keeps there in their turn.

    Gradients and optimizer state are in host memory by then; activations and 8-bit weights are gone. With
    weight_sync.offload_weights the trainer's weights stay until the push is over, next to those of the engines, and
    leave before these take their cache.
    """
    engine, weights, overhead = config.rollout.engine, parts["weights"], parts["overhead"]
    offloads = config.weight_sync.offload_weights
    kept = overhead if offloads else weights + overhead
    share = engine.gpu_memory_utilization
    if share * gpu_gib + kept > gpu_gib:
        advice = "raise parallel.tp or parallel.pp" + ("" if offloads else ", or set weight_sync.offload_weights")
        raise UserError(
            f"{stage}: engines take {share:g} × {gpu_gib:g} = {share * gpu_gib:.1f} GiB of a GPU and the trainer keeps "
            f"{kept:.1f} (weights {kept - overhead:.1f}, overhead {overhead:.1f}), there are {gpu_gib:g}: "
            f"lower rollout.engine.gpu_memory_utilization to {max(0.0, 1 - kept / gpu_gib):.2f}, or {advice}"
        )
    received = arch.parameter_count() * WEIGHT_BYTES[engine.dtype or config.model.dtype] / engine.tp / GIB
    if received + weights + overhead > gpu_gib:
        raise UserError(
            f"{stage}: during a push a GPU holds the engine's weights ({received:.1f} GiB) and the trainer's "
            f"({weights:.1f}) with {overhead:.1f} of overhead, there are {gpu_gib:g}: raise rollout.engine.tp, "
            "parallel.tp or parallel.pp"
        )


def check_memory(arch: Architecture, config: Config, stages: list[str]) -> dict[str, float]:
    """GiB per rank of each stage; UserError with the parts if one does not fit cluster.gpu_memory_gib (if given)."""
    needs = {}
    for stage in stages:
        own = stage_config(config, stage)
        parts = plan(arch, own, stage)
        needs[stage] = sum(parts.values())
        limit = own.cluster.gpu_memory_gib
        if limit is None:
            continue
        if stage in ENGINE_STAGES and engine_placement(own) == "trainer_gpus":
            check_generation_memory(arch, own, stage, parts, limit)
            limit -= ASLEEP_GIB
        if needs[stage] > limit:
            listed = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
            raise UserError(
                f"{stage} needs about {needs[stage]:.0f} GiB per GPU ({listed}), there are {limit:.0f}: raise "
                "parallel.tp, parallel.pp or (for activations) parallel.cp, set parallel.distributed_optimizer or "
                "parallel.recompute: full, or lower parallel.tokens_per_microbatch"
            )
    return needs
