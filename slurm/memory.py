"""The memory plan: what one trainer rank's GPU will hold in a stage, estimated before anything is queued."""

from megatron_vcppo.config import Config
from megatron_vcppo.config.checks import trainer_ranks
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore.architecture import Architecture
from slurm.roles import ROLLOUT_STAGES

GIB = 1 << 30
TRAINED_MODELS = {"sft": 1, "reward_model": 1, "value_pretrain": 1, "ppo": 2}
"""Models with gradients and optimizer state at once; PPO: actor and critic. Other stages hold weights alone."""
WEIGHT_BYTES = {"bfloat16": 2, "float32": 4}
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"bfloat16": 12, "float32": 8}
"""Adam's two moments in float32, and a float32 copy of bfloat16 weights."""
ACTIVATION_BYTES = {"none": 34, "selective": 34, "full": 2}
"""Per token, layer and hidden unit with flash attention (arXiv:2205.05198, table 2); full: each layer's input alone."""
OVERHEAD_GIB = 3.0
"""CUDA context, communication buffers, fragmentation."""


def plan(arch: Architecture, config: Config, stage: str) -> dict[str, float]:
    """GiB per part on the fullest rank: the first pipeline stage, which holds as many micro-batches as there are.

    Not counted: the keys and values that context parallelism gathers in each layer without Transformer Engine, where
    nothing is recomputed.
    """
    parallel = config.parallel
    split = parallel.tp * parallel.pp
    replicas = trainer_ranks(config) // (split * parallel.cp)
    parameters = arch.parameter_count() / split
    trained = TRAINED_MODELS.get(stage, 0)
    models = max(1, trained) + (1 if stage == "ppo" and config.ppo.loss.kl_coef else 0)
    optimizer = trained * parameters * OPTIMIZER_BYTES[config.model.dtype]
    tokens = parallel.tokens_per_microbatch / parallel.cp
    layers = arch.num_layers / parallel.pp * min(parallel.pp, 4)
    activations = tokens * arch.hidden_size * layers * ACTIVATION_BYTES[parallel.recompute] / parallel.tp
    logits = tokens * arch.vocab_size / parallel.tp * 8
    return {
        "weights": models * parameters * WEIGHT_BYTES[config.model.dtype] / GIB,
        "gradients": trained * parameters * GRADIENT_BYTES / GIB,
        "optimizer": optimizer / (replicas * parallel.cp if parallel.distributed_optimizer else 1) / GIB,
        "activations": (activations if trained else 0) / GIB,
        "logits": logits / GIB,
        "overhead": OVERHEAD_GIB,
    }


def check_memory(arch: Architecture, config: Config, stages: list[str]) -> dict[str, float]:
    """GiB per rank of each stage; UserError with the parts if one does not fit cluster.gpu_memory_gib (if given)."""
    cluster, needs = config.cluster, {}
    for stage in stages:
        parts = plan(arch, config, stage)
        needs[stage] = sum(parts.values())
        limit = cluster.gpu_memory_gib
        if limit is None:
            continue
        if stage in ROLLOUT_STAGES and not cluster.rollout_nodes:
            limit *= 1 - config.rollout.engine.gpu_memory_utilization
        if needs[stage] > limit:
            listed = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
            raise UserError(
                f"{stage} needs about {needs[stage]:.0f} GiB per GPU ({listed}), there are {limit:.0f}: raise "
                "parallel.tp, parallel.pp or (for activations) parallel.cp, set parallel.distributed_optimizer or "
                "parallel.recompute: full, or lower parallel.tokens_per_microbatch"
            )
    return needs
