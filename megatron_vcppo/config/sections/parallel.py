"""Section ``parallel``."""

from dataclasses import dataclass
from typing import Literal

from megatron_vcppo.config.ranges import PositiveInt


@dataclass
class ParallelConfig:
    """How the trainer's ranks divide the model and the data. World size = tp × pp × cp × dp."""

    tp: PositiveInt = 1
    """Tensor-parallel size: each layer is split over this many ranks, which must be on one node."""
    pp: PositiveInt = 1
    """Pipeline-parallel size: the layers are divided into this many pipeline stages."""
    cp: PositiveInt = 1
    """Context-parallel size: each sequence is divided over this many ranks, for responses too long for one rank.

    Sequences are padded to multiples of 2 × cp tokens. Attention is Transformer Engine's ring where that is installed;
    otherwise keys and values are gathered, which saves memory only with recompute (selective is enough).
    """
    dp: PositiveInt | None = None
    """Data-parallel size (number of model replicas). Default: number of ranks / (tp × pp × cp)."""
    sequence_parallel: bool = False
    """Also split the activations of the norms along the sequence; needs tp > 1."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel and context-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction (and, with the distributed optimizer, parameter gathering) with computation."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass: none, those of attention (selective), or all (full)."""
    tokens_per_microbatch: PositiveInt = 4096
    """Token budget of a packed micro-batch; a longer sequence gets its own micro-batch. With context parallelism each
    rank holds 1 / cp of a micro-batch."""
