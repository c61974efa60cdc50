"""Sections ``model`` and ``parallel``."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from megatron_vcppo.config.ranges import NonNegativeFloat, PositiveFloat, PositiveInt

Dtype = Literal["bfloat16", "float32"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class LoraConfig:
    """Low-rank adapters: all stages train these and the heads of critics, and leave the model's weights as they are.

    Actor and critic have their own adapters. Where both start from the same weights, PPO holds these once.
    """

    rank: PositiveInt | None = None
    """Rank of every adapter. Default: none, all weights are trained."""
    alpha: PositiveFloat = 32.0
    """An adapter adds alpha / rank × B·A to the weight of its layer."""
    targets: list[LoraTarget] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers that get an adapter, by their Hugging Face names."""


@dataclass
class ModelConfig:
    """The Hugging Face model from which training starts."""

    hf: str = MISSING
    """Folder of a Hugging Face checkpoint (docs/models.md: which): config.json, safetensors, tokenizer."""
    weights: str | None = None
    """Folder of a checkpoint of Megatron-LM (torch_dist) to take the weights from, if not from model.hf.

    It, or an iter_N in it; architecture and tokenizer are those of model.hf, which then needs no safetensors.
    """
    dtype: Dtype = "bfloat16"
    """Type of parameters and activations; gradients are always reduced in float32."""
    max_length: PositiveInt = 4096
    """Maximum length of a sequence (prompt + response) in tokens."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights of a new head (value head, reward head)."""
    router_aux_loss_coef: NonNegativeFloat = 0.0
    """Mixtures of experts: coefficient of the loss that evens out the load of experts within each sequence.

    On the scale of Hugging Face's (num_experts_per_tok if the load is even), the mean over layers; for actor and critic
    alike. Default: off, whatever config.json says, whose value is that of pretraining.
    """
    router_z_loss_coef: NonNegativeFloat = 0.0
    """Mixtures of experts: coefficient of the mean of (log Σ exp)² of the routers' logits, which keeps them small."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Implementation of the layers: Transformer Engine's kernels, or torch operations in this package's own layers.

    auto: Transformer Engine if it is installed and there is a GPU, else torch.
    """
    fp8: Literal["off", "hybrid"] = "off"
    """8-bit floating point in the matrix products of the layers. hybrid: E4M3 forward, E5M2 for gradients.

    Needs Transformer Engine, bfloat16 and a Hopper, Ada or newer GPU. Weights, their float32 copies, checkpoints and
    exports are the same as without it; micro-batches are padded to a multiple of 16 tokens per rank (blockwise: 128).
    """
    fp8_recipe: Literal["delayed", "current", "blockwise"] = "current"
    """Scaling of the 8-bit tensors: by the largest value of earlier steps (delayed), of the tensor itself (current), or
    of each block (blockwise). delayed is the fastest; its history starts again in each stage and after each resume."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def base(self) -> str:
        """The folder with the weights from which training starts."""
        return self.weights or self.hf


@dataclass
class ParallelConfig:
    """How the trainer's ranks divide the model and the data. World size = tp × pp × cp × dp."""

    tp: PositiveInt = 1
    """Tensor-parallel size: each layer is split over this many ranks, which must be on one node."""
    pp: PositiveInt = 1
    """Pipeline-parallel size: the layers are divided into this many pipeline stages.

    Where they do not divide, the first and the last stage, which also hold embedding and output layer, get fewer.
    """
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage; the stages without a given number share the others evenly."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, for instance fewer where a large vocabulary makes it the slowest."""
    cp: PositiveInt = 1
    """Context-parallel size: each sequence is divided over this many ranks, for responses too long for one rank.

    Sequences are padded to multiples of 2 × cp tokens. Attention is Transformer Engine's ring where that is installed;
    otherwise keys and values are gathered, which saves memory only with recompute (selective is enough).
    """
    dp: PositiveInt | None = None
    """Data-parallel size (number of model replicas). Default: number of ranks / (tp × pp × cp)."""
    sequence_parallel: bool = False
    """Also split the activations of the norms along the sequence; needs tp > 1. A mixture of experts with tp > 1 needs
    it."""
    ep: PositiveInt = 1
    """Expert-parallel size, of mixtures of experts: the experts of each layer are divided over this many ranks.

    They are ranks of one pipeline stage that other dimensions count already, so ep divides tp × cp × dp; it may span
    replicas. An expert is never split: tp divides the rest of a layer only.
    """
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel and context-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction (and, with the distributed optimizer, parameter gathering) with computation."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass: none, those of attention (selective), or all (full)."""
    tokens_per_microbatch: PositiveInt = 4096
    """Token budget of a packed micro-batch; a longer sequence gets its own micro-batch. With context parallelism each
    rank holds 1 / cp of a micro-batch."""

    @property
    def ends(self) -> tuple[int | None, int | None]:
        """Layers of the first and of the last pipeline stage, if they are given."""
        return self.first_stage_layers, self.last_stage_layers
