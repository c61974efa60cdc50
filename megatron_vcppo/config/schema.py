"""Every configuration key, its type, its default and its meaning. The only place where defaults live.

A key's docstring (the string below it) is what ``vcppo config --explain`` prints.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from megatron_vcppo.config.cluster import ClusterConfig
from megatron_vcppo.config.rewards import RewardsConfig
from megatron_vcppo.config.rl import (
    EvaluateConfig,
    ExportConfig,
    PpoConfig,
    PromptsConfig,
    RewardModelConfig,
    ValuePretrainConfig,
)
from megatron_vcppo.config.rollout import RolloutConfig, WeightSyncConfig
from megatron_vcppo.config.training import CheckpointConfig, OptimizerConfig, ScheduleConfig

Dtype = Literal["bfloat16", "float32"]
Stage = Literal["sft", "reward_model", "value_pretrain", "ppo", "evaluate", "export"]


@dataclass
class RunConfig:
    """Where a run lives and what it reports."""

    dir: str = MISSING
    """The run folder; every stage writes below it. On a cluster it must be on the shared file system."""
    seed: int = 0
    """Seeds data order, sampling and initial heads; two runs with one seed and one layout are equal."""
    wandb: Literal["online", "offline", "off"] = "off"
    """Metrics also go to Weights & Biases; offline runs are uploaded later with `wandb sync`."""
    wandb_project: str = "megatron_vcppo"
    """Project at Weights & Biases."""
    check_numerics: bool = True
    """Stop with the tensor's name when a NaN or infinity reaches a loss."""
    timeout_s: float = 600.0
    """Deadline of every collective and process wait: what takes longer is reported as hung. An iteration, which is many
    of them, may take longer, and so may a save on request (docs/slurm.md)."""


@dataclass
class ModelConfig:
    """The Hugging Face model that training starts from."""

    hf: str = MISSING
    """Folder of a Hugging Face checkpoint (Qwen2, Qwen2.5, Qwen3, Llama 3): config.json, safetensors, tokenizer."""
    dtype: Dtype = "bfloat16"
    """Parameters and activations; gradients are always reduced in float32."""
    max_length: int = 4096
    """Longest sequence (prompt + response) in tokens."""
    init_std: float = 0.02
    """Standard deviation of a newly made head (value head, reward head)."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Who computes the layers: Transformer Engine's kernels, or torch's operations in layers of this package.

    auto: Transformer Engine where it is installed and there is a GPU.
    """
    fp8: Literal["off", "hybrid"] = "off"
    """Matrix products of the layers in 8-bit floating point: hybrid is E4M3 forward, E5M2 for gradients.

    Needs Transformer Engine, bfloat16 and a GPU from Hopper or Ada on. Weights, their float32 copies, checkpoints and
    exports stay what they are without it; micro-batches are padded to multiples of 16 tokens per rank (blockwise: 128).
    """
    fp8_recipe: Literal["delayed", "current", "blockwise"] = "current"
    """Scales of the 8-bit tensors: from the largest value of earlier steps, of the tensor itself, or of each block.

    delayed is the fastest, and keeps a history, which each stage and each resume starts again.
    """


@dataclass
class ParallelConfig:
    """How the trainer's ranks share the model. Data parallelism is what is left: world size / (tp × pp × cp)."""

    tp: int = 1
    """Tensor-parallel ranks: each layer is split; keep it inside a node."""
    pp: int = 1
    """Pipeline stages: the layers are split."""
    cp: int = 1
    """Context-parallel ranks, which share each sequence: for responses too long for one rank's memory.

    Sequences are padded to multiples of 2 × cp tokens. Attention is Transformer Engine's ring where that is installed;
    without it keys and values are gathered, which wants recompute (selective is enough) to save memory.
    """
    dp: int | None = None
    """Data-parallel replicas. Default: what the number of ranks gives."""
    sequence_parallel: bool = False
    """Split the norms' activations along the sequence too; needs tp > 1."""
    distributed_optimizer: bool = False
    """Share the optimizer's state over the data-parallel and context-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction (and, with the distributed optimizer, parameter gathering) with computation."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations are recomputed in the backward pass."""
    tokens_per_microbatch: int = 4096
    """Token budget to which packed micro-batches are filled; a longer sequence gets a micro-batch of its own.

    With context parallelism each rank holds 1 / cp of a micro-batch.
    """


@dataclass
class SftConfig:
    """Supervised fine-tuning: loss on responses only."""

    train: str = MISSING
    """JSONL file, folder or folder:split of a saved data set, or name or name:split of a `datasets` data set."""
    validation: str | None = None
    """Held-out samples, read like sft.train; a data set without a split named is read at its split train here too."""
    prompt_key: str = "prompt"
    """Name of the prompt in the data."""
    response_key: str = "response"
    """Name of the response in the data."""
    messages_key: str = "messages"
    """Samples that have this key are chats, formatted by the tokenizer's chat template."""
    bad_samples: Literal["error", "skip", "truncate"] = "error"
    """What happens to malformed lines, empty responses, samples over model.max_length."""
    epochs: int = 1
    """Passes over the data, unless sft.steps is set."""
    steps: int | None = None
    """Optimizer steps. Default: what epochs gives."""
    batch_size: int = 32
    """Sequences per optimizer step, over all ranks."""
    validate_every: int = 100
    """Optimizer steps between validation passes; 0: only at the end."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="cosine", warmup_steps=20, min_lr_ratio=0.1)
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class Config:
    """The whole configuration. ``stages`` is the chain; each stage's own section holds its settings."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    stages: list[Stage] = field(default_factory=lambda: ["sft", "export"])
    """The chain, in order."""
    sft: SftConfig = field(default_factory=SftConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    value_pretrain: ValuePretrainConfig = field(default_factory=ValuePretrainConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
