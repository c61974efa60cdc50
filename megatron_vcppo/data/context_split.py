"""Context parallelism: which tokens of a packed micro-batch each rank of a replica holds. Pure functions.

Every segment is cut into 2 · cp_size chunks of equal length, and rank r holds chunks r and 2 · cp_size - 1 - r of
each: an early one, whose tokens attend to little, and a late one. So all ranks have the same work in causal attention.
Megatron and Transformer Engine lay packed sequences out in the same way.
"""

import math

import torch
from torch import Tensor

from megatron_vcppo.config import ModelConfig, ParallelConfig

FP8_TOKENS = {"delayed": 16, "current": 16, "blockwise": 128}
"""Tokens per rank of which FP8's matrix products take multiples: their rows are 16 bytes; blocks are 128 tokens."""


def rounding(parallel: ParallelConfig, model: ModelConfig | None = None) -> tuple[int, int]:
    """(multiple, segment_multiple) to which ``packing.pack`` must round micro-batches and segments in this layout.

    Each rank's part of a segment is two chunks of whole tokens, and sequence parallelism splits that part of the
    micro-batch over tp. With FP8 (``model``; None: without) the tokens that are left to a rank are rounded too.
    """
    segment_multiple = 2 * parallel.cp if parallel.cp > 1 else 1
    multiple = parallel.cp * parallel.tp if parallel.sequence_parallel else 1
    if model is not None and model.fp8 != "off":
        multiple = math.lcm(multiple, parallel.cp) * FP8_TOKENS[model.fp8_recipe]
    return math.lcm(multiple, segment_multiple), segment_multiple


def rank_order(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Places of the tokens in the micro-batch, rank by rank: int64 [T], of which rank r holds the r-th equal part.

    cu_seqlens: [S + 1], segments that are multiples of 2 · cp_size tokens. A rank keeps the order of the segments, and
    its early chunk comes before its late one.
    Example: cu_seqlens 0 4 12 on two ranks gives 0 3 4 5 10 11 and 1 2 6 7 8 9.
    """
    spans = cu_seqlens.diff().long()
    assert not (spans % (2 * cp_size)).any(), f"segments of {spans.tolist()} tokens on {cp_size} context-parallel ranks"
    starts, chunk_lengths = (x.repeat_interleave(spans) for x in (cu_seqlens[:-1].long(), spans // (2 * cp_size)))
    chunk = (torch.arange(len(starts)) - starts) // chunk_lengths
    owner = torch.minimum(chunk, 2 * cp_size - 1 - chunk)
    return owner.argsort(stable=True)
