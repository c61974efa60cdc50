"""The memory plan: what the fullest trainer rank will hold in a stage, estimated before anything is queued.

``tools/bench.py memory`` compares it with what ranks of several layouts hold; docs/slurm.md has the figures.
"""

from megatron_vcppo.config import Config
from megatron_vcppo.config.placement import ENGINE_STAGES, engine_placement, trainer_ranks
from megatron_vcppo.config.stage_overrides import stage_config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapters import adapter_parameters
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.frozen import frozen_counts, frozen_patterns
from megatron_vcppo.hf.pipeline import stage_layers
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

    A tied output layer is a second copy where the last stage is not the first; a critic has none. Of experts: none.
    """
    tp, pp = config.parallel.tp, config.parallel.pp
    vocabulary = arch.vocab_size * arch.hidden_size
    layers = arch.parameter_count() - arch.expert_parameter_count() - vocabulary * (1 if arch.tied else 2)
    count = layers * share_of_layers(arch, config, pp_rank)
    if pp_rank == 0:
        count += vocabulary
    if pp_rank == pp - 1 and kind == "actor" and (pp > 1 or not arch.tied):
        count += vocabulary
    return count / tp


def frozen_parameters(arch: Architecture, config: Config, stage: str) -> tuple[int, int, int]:
    """Parameters of the stage's critic that are not trained (``ppo.critic.frozen``): (of all layers without experts, of
    experts, of the embedding).

    Raises UserError if the patterns do not fit the model.
    """
    if "critic" not in models_of(config, stage)[0]:
        return 0, 0, 0
    key, patterns = frozen_patterns(config, stage)
    return frozen_counts(arch, patterns, key, config.parallel.pp)


def expert_parameters_of(arch: Architecture, config: Config, pp_rank: int) -> float:
    """Parameters of a model's experts on one rank."""
    return arch.expert_parameter_count() * share_of_layers(arch, config, pp_rank) / config.parallel.ep


def share_of_layers(arch: Architecture, config: Config, pp_rank: int) -> float:
    """The share of all layers that a pipeline stage has."""
    parallel = config.parallel
    return stage_layers(arch.num_layers, parallel.pp, parallel.ends)[pp_rank] / arch.num_layers


def bases_of(config: Config, stage: str) -> list[str]:
    """With adapters: kinds of the models that have weights of their own below them; the others share these.

    Actor and critic of a run start from one base; a critic from elsewhere is counted as one with its own.
    """
    if stage == "ppo":
        own = config.ppo.advantage.baseline == "critic" and config.ppo.critic.init == "checkpoint"
    else:
        own = stage == "value_pretrain" and config.value_pretrain.init == "checkpoint"
    return ["actor", "critic"] if own else ["actor"]


def parameters_on_rank(arch: Architecture, config: Config, stage: str, pp_rank: int) -> tuple[float, float]:
    """(trained, held) parameters of the stage's models on one rank, without experts' and a reward model's."""
    trained, frozen = models_of(config, stage)
    lora, parallel = config.model.lora, config.parallel
    if lora.rank is None:
        owned = sum(parameters_of(arch, config, kind, pp_rank) for kind in trained)
        layers, _, embedding = frozen_parameters(arch, config, stage)
        still = layers * share_of_layers(arch, config, pp_rank) + (embedding if pp_rank == 0 else 0)
        return owned - still / parallel.tp, owned + sum(parameters_of(arch, config, kind, pp_rank) for kind in frozen)
    adapters = adapter_parameters(arch, lora, parallel.tp) * share_of_layers(arch, config, pp_rank)
    bases = sum(parameters_of(arch, config, kind, pp_rank) for kind in bases_of(config, stage))
    return adapters * len(trained), adapters * len(trained + frozen) + bases


def layer_activations(arch: Architecture, config: Config) -> tuple[float, float]:
    """(input, everything) that one layer keeps for its backward pass: elements per token on one rank.

    Attention keeps its projection's output, the rotated queries and keys, its own output and the copy that the next
    projection reads. Each norm keeps its input and output, the gated MLP both halves and their product. Where torch's
    own operations take the place of Transformer Engine's kernels, the MLP keeps two tensors more, and each norm one,
    except in float32 (layers.RMSNorm).
    In a layer with experts each token passes through some of them, to each of which it is copied and from which it
    comes back, twice (in the rank's order of tokens and in the experts'); the router keeps its logits and weights in
    float32. That is for an even load, which the fullest rank exceeds.
    """
    parallel, fused = config.parallel, config.cluster.gpus_per_node > 0
    norms, mlp = 4 if fused or config.model.dtype == "float32" else 6, 3 if fused else 5
    norms *= 2 if arch.norms == "both" else 1
    hidden = arch.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
    feed_forward: float = mlp * arch.ffn_size
    if arch.experts is not None:
        copies = arch.experts.per_token * (mlp * arch.experts.ffn_size + 4 * arch.hidden_size)
        sparse = len(arch.sparse_layers) / arch.num_layers
        feed_forward = (1 - sparse) * feed_forward + sparse * (copies + 8 * arch.experts.count)
    inside = 4 * arch.q_size + 3 * arch.kv_size + feed_forward
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
    lora = config.model.lora
    alike = trainer_ranks(config) // parallel.pp  # ranks of a stage, over which what they hold alike is shared
    sharing, experts_sharing = alike // parallel.tp, alike // parallel.ep
    if not parallel.distributed_optimizer:
        sharing = experts_sharing = 1
    experts = expert_parameters_of(arch, config, pp_rank)
    learned, held = parameters_on_rank(arch, config, stage, pp_rank)
    learned_experts = 0.0
    if lora.rank is None:
        still = frozen_parameters(arch, config, stage)[1] * share_of_layers(arch, config, pp_rank) / parallel.ep
        learned_experts = experts * len(trained) - still
    optimized = learned / sharing + learned_experts / experts_sharing
    learned += learned_experts
    held += experts * len(trained + frozen)
    if uses_reward_model(config, stage):
        scorer = reward_architecture(config, arch)
        held += parameters_of(scorer, config, "critic", pp_rank) + expert_parameters_of(scorer, config, pp_rank)
    size = WEIGHT_BYTES[dtype]
    tokens = max(parallel.tokens_per_microbatch, config.model.max_length) / parallel.cp
    layers, at_once = stage_layers(arch.num_layers, parallel.pp, parallel.ends)[pp_rank], parallel.pp - pp_rank
    given, kept = layer_activations(arch, config)
    # Logits and their gradient, which a CPU writes over them; then that and the gradient of the output layer, in the
    # weights' type.
    gradient = tokens if config.cluster.gpus_per_node else 0
    output_weight = arch.hidden_size if lora.rank is None else 0
    logits = (tokens + max(gradient, output_weight)) * arch.vocab_size / parallel.tp
    if "actor" not in trained or pp_rank < parallel.pp - 1:
        logits = 0.0
    if lora.rank is not None:  # what is between the two matrices, before and after the ranks' exchange
        kept += 2 * lora.rank * len(lora.targets)
    activations = kept * layers * at_once * tokens
    if parallel.recompute == "full":  # the layer that is recomputed comes after the logits
        activations = given * layers * at_once * tokens + max(0.0, kept * tokens - logits)
    if lora.rank is not None:  # of the widest layer what its adapters add, in Megatron's order, and the sum
        activations += 3 * 2 * arch.ffn_size / parallel.tp * tokens
    sizes = {
        "weights": held * size,
        "gradients": learned * GRADIENT_BYTES,
        "optimizer": optimized * OPTIMIZER_BYTES[dtype],
        "activations": activations * size if trained else 0.0,
        "logits": logits * size,
        "overhead": OVERHEAD_GIB * GIB,
    }
    if config.model.fp8 != "off":  # of layers that run; those of trained models as they are and transposed
        run = 2 * len(trained) + (len(frozen) if stage == "ppo" else 0)
        vocabulary = arch.vocab_size * arch.hidden_size * (1 if arch.tied else 2)
        sizes["8-bit weights"] = run * (arch.parameter_count() - vocabulary) * layers / arch.num_layers / parallel.tp
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
                f"{'parallel.ep, ' if arch.experts else ''}parallel.tp, parallel.pp or (for activations) parallel.cp, "
                "set parallel.distributed_optimizer or parallel.recompute: full, or lower "
                "parallel.tokens_per_microbatch"
            )
    return needs
