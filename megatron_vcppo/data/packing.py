"""Sequences into packed micro-batches: which go together, who gets which, and the shift by one token.

Packed means concatenated along one axis of T tokens, with segment borders in ``cu_seqlens`` and no padding between
sequences, but what context parallelism needs at their ends. The model's output at t predicts token t + 1 of the same
segment, so every per-token field is moved one place to the left inside its segment here, once, and nowhere else.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.integers import round_up
from megatron_vcppo.records import TrainSequence

FP8_TOKENS = {"delayed": 16, "current": 16, "blockwise": 128}
"""Tokens per rank of which FP8's matrix products take multiples: their rows are 16 bytes; blocks are 128 tokens."""


@dataclass(frozen=True)
class PackedMicrobatch:
    """One forward's worth of sequences. S segments: the sequences and, if the length had to be rounded up, a dummy.

    Example: sequences (5, 6, 7) and (8, 9) with field "x" (0, 1, 2) and (0, 3) give token_ids 5 6 7 8 9,
    position_ids 0 1 2 0 1, cu_seqlens 0 3 5, labels 6 7 0 9 0, fields["x"] 1 2 0 3 0.
    """

    token_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[T] int64, from 0 in each segment."""
    cu_seqlens: Tensor
    """[S + 1] int32: segment s is cu_seqlens[s] to cu_seqlens[s + 1]."""
    labels: Tensor
    """[T] int64: the token that the output at t predicts, 0 where there is none."""
    fields: dict[str, Tensor]
    """name → [T], aligned with ``labels``; bool or float32, as its sequences have it; 0 where no label is."""
    sequence_index: tuple[int, ...]
    """For each packed sequence, in order, its index in the list that it came from."""
    lengths: tuple[int, ...]
    """Tokens of each packed sequence, without padding."""
    padding_tokens: int
    """Tokens that only round lengths up."""
    routed_experts: Tensor | None = None
    """[T, layers, K]: the experts that the engine chose for each token (not shifted: they belong to the input); 0 for
    padding and for the last token of each sequence. None: not known."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.token_ids)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""
        return int(self.cu_seqlens.diff().max())

    def to(self, device: torch.device) -> "PackedMicrobatch":
        """The same micro-batch with its tensors on ``device``."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            labels=self.labels.to(device),
            fields={name: values.to(device) for name, values in self.fields.items()},
            routed_experts=None if self.routed_experts is None else self.routed_experts.to(device),
        )

    def unpack(self, values: Tensor) -> list[Tensor]:
        """Undo packing and shift for a model output: a CPU tensor per sequence, entry t belongs to its token t.

        values: [T], aligned with ``labels``. Entry 0 of each tensor is 0: nothing predicts the first token.
        """
        assert values.shape == self.token_ids.shape, f"{tuple(values.shape)} values for {self.num_tokens} tokens"
        flat, starts = values.cpu(), self.cu_seqlens.tolist()
        return [
            torch.cat((flat.new_zeros(1), flat[start : start + length - 1]))
            for start, length in zip(starts, self.lengths, strict=False)
        ]


def pack(
    sequences: Sequence[TrainSequence],
    sequence_index: Sequence[int],
    multiple: int = 1,
    segment_multiple: int = 1,
    empty_fields: Mapping[str, type] = MappingProxyType({}),
) -> PackedMicrobatch:
    """Concatenate ``sequences[i] for i in sequence_index``; all have the same fields.

    multiple: T is rounded up to it by one dummy segment (sequence and context parallelism). segment_multiple: each
    segment is rounded up to it by tokens at its end (context parallelism). ``rounding`` gives both. No sequences: only
    the dummy segment, with ``empty_fields`` (name → bool | float), for a rank that has no work but must join the
    collectives.
    """
    assert multiple % segment_multiple == 0, f"multiple {multiple} must contain segment_multiple {segment_multiple}"
    chosen = [sequences[i] for i in sequence_index]
    lengths = [len(sequence) for sequence in chosen]
    assert all(lengths), "an empty sequence cannot be packed"
    spans = [round_up(length, segment_multiple) for length in lengths]
    num_tokens = max(round_up(sum(spans), multiple), multiple)
    if num_tokens > sum(spans):
        spans.append(num_tokens - sum(spans))
    borders = np.cumsum([0, *spans])

    token_ids = np.zeros(num_tokens, dtype=np.int64)
    labels = np.zeros(num_tokens, dtype=np.int64)
    kinds = {name: np.asarray(values[:1]).dtype for name, values in chosen[0].fields.items()} if chosen else {}
    dtypes = {
        name: np.bool_ if np.issubdtype(kind, np.bool_) else np.float32
        for name, kind in (kinds or empty_fields).items()
    }
    names = list(dtypes)
    fields: dict[str, np.ndarray] = {name: np.zeros(num_tokens, dtype=dtype) for name, dtype in dtypes.items()}
    for sequence, start, length in zip(chosen, borders, lengths, strict=False):
        ids = np.asarray(sequence.token_ids, dtype=np.int64)
        token_ids[start : start + length] = ids
        labels[start : start + length - 1] = ids[1:]
        assert list(sequence.fields) == names, f"fields {list(sequence.fields)}, not {names}, in one micro-batch"
        for name, values in sequence.fields.items():
            assert len(values) == length, f"field {name}: {len(values)} values for {length} tokens"
            assert not (dtypes[name] is np.bool_ and values[0]), f"field {name}: nothing predicts the first token"
            fields[name][start : start + length - 1] = values[1:]
    routed_experts = None
    if chosen and chosen[0].routed_experts is not None:
        kind = chosen[0].routed_experts
        routed_experts = np.zeros((num_tokens, *kind.shape[1:]), dtype=kind.dtype)
        for sequence, start, length in zip(chosen, borders, lengths, strict=False):
            routed_experts[start : start + length - 1] = sequence.routed_experts[: length - 1]
    return PackedMicrobatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(np.arange(num_tokens) - np.repeat(borders[:-1], spans)),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        labels=torch.from_numpy(labels),
        fields={name: torch.from_numpy(values) for name, values in fields.items()},
        sequence_index=tuple(sequence_index),
        lengths=tuple(lengths),
        padding_tokens=num_tokens - sum(lengths),
        routed_experts=None if routed_experts is None else torch.from_numpy(routed_experts),
    )


def pack_all(
    sequences: Sequence[TrainSequence], tokens_per_microbatch: int, multiple: int = 1, segment_multiple: int = 1
) -> list[PackedMicrobatch]:
    """Every sequence once, in as few micro-batches of the token budget as were found; arguments as in ``pack``."""
    spans = [round_up(len(sequence), segment_multiple) for sequence in sequences]
    bins = pack_into_microbatches(spans, tokens_per_microbatch)
    return [pack(sequences, indices, multiple, segment_multiple) for indices in bins]


def unpack_all(microbatches: Sequence[PackedMicrobatch], values: Sequence[Tensor]) -> list[Tensor]:
    """``PackedMicrobatch.unpack`` over the result of ``pack_all``: a tensor per sequence, in the original order.

    values: per micro-batch one number per token, [T].
    """
    rows = dict(unpack_each(microbatches, values))
    return [rows[i] for i in range(len(rows))]


def unpack_each(microbatches: Sequence[PackedMicrobatch], values: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """``unpack_all`` one by one, in the order of the micro-batches: (index of the sequence, its values)."""
    for microbatch, output in zip(microbatches, values, strict=True):
        yield from zip(microbatch.sequence_index, microbatch.unpack(output), strict=True)


def pack_into_microbatches(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Bins of sequence indices whose lengths sum to at most the budget: best-fit decreasing, deterministic.

    A sequence longer than the budget gets its own bin. Indices rise within a bin; bins are ordered by their
    first index. O(n log n); at most 11/9 of the optimum, in practice one or two bins above the sum.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = lengths[index]
        place = bisect_left(open_bins, (length, 0))
        if place < len(open_bins):
            free, target = open_bins.pop(place)
            bins[target].append(index)
        else:
            free, target = tokens_per_microbatch, len(bins)
            bins.append([index])
        if free > length:
            insort(open_bins, (free - length, target))
    return sorted(sorted(indices) for indices in bins)


def balance(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Distribute sequences over ranks so that the largest sum of lengths is small: greedy, then pairwise exchange.

    Returns num_ranks lists of rising indices; some are empty only if there are fewer sequences than ranks.
    Longest-first to the least loaded rank (Graham 1969), then moves and swaps out of the most loaded rank
    until none lowers the maximum. Deterministic.
    """
    costs = np.asarray(lengths, dtype=np.float64)
    heap = [(0.0, rank) for rank in range(num_ranks)]
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in np.argsort(-costs, kind="stable").tolist():
        load, rank = heap[0]
        ranks[rank].append(index)
        heapq.heapreplace(heap, (load + costs[index], rank))
    loads = np.zeros(num_ranks)
    for load, rank in heap:
        loads[rank] = load
    _exchange(ranks, loads, costs)
    return [sorted(indices) for indices in ranks]


def _exchange(ranks: list[list[int]], loads: np.ndarray, costs: np.ndarray) -> None:
    """Lower max(loads) in place. Stops within 0.1 % of the mean, or when no single move or swap helps."""
    for _ in range(4 * len(costs)):
        heavy = int(loads.argmax())
        if loads[heavy] <= 1.001 * loads.mean():
            return
        best_peak, best = loads[heavy] * (1 - 1e-9), None
        for light in np.argsort(loads, kind="stable")[:8].tolist():
            # An exchange moves cost a - b (b = 0: a move) from heavy to light; half the gap would be ideal.
            gain = costs[ranks[heavy]][:, None] - np.append(costs[ranks[light]], 0.0)[None, :]
            peak = np.maximum(loads[heavy] - gain, loads[light] + gain)
            at = int(peak.argmin())
            if peak.flat[at] < best_peak and len(ranks[heavy]) > 1:
                best_peak, best = peak.flat[at], (light, *divmod(at, gain.shape[1]))
        if best is None:
            return
        light, out, back = best
        moved = ranks[heavy].pop(out)
        if back < len(ranks[light]):
            ranks[heavy].append(ranks[light].pop(back))
        ranks[light].append(moved)
        for rank in (heavy, light):
            loads[rank] = costs[ranks[rank]].sum()


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
