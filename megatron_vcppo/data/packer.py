"""A replica's shard of a batch of sequences, as packed micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.data.packing import (
    PackedMicrobatch,
    balance,
    pack,
    pack_all,
    pack_into_microbatches,
    rounding,
)
from megatron_vcppo.integers import round_up
from megatron_vcppo.records import TrainSequence

NO_FIELDS: Mapping[str, type] = MappingProxyType({})


@dataclass(frozen=True)
class Packer:
    """How sequences become this replica's micro-batches."""

    tokens_per_microbatch: int
    multiple: int
    """Micro-batch lengths are rounded up to it, see ``packing.rounding``."""
    dp_rank: int
    dp_size: int
    segment_multiple: int = 1
    """Each sequence is padded to a multiple of this (context parallelism)."""

    @classmethod
    def of(cls, parallel: ParallelConfig, model: ModelConfig, dp_rank: int, dp_size: int) -> "Packer":
        """As a layout and a precision need it."""
        multiple, segment_multiple = rounding(parallel, model)
        return cls(parallel.tokens_per_microbatch, multiple, dp_rank, dp_size, segment_multiple)

    def shard(self, lengths: Sequence[int]) -> list[int]:
        """Indices of the sequences that this data-parallel replica works on."""
        return balance(lengths, self.dp_size)[self.dp_rank]

    def imbalance(self, lengths: Sequence[int]) -> float:
        """Tokens of the fullest replica over the mean; 1 is even."""
        loads = [sum(lengths[i] for i in shard) for shard in balance(lengths, self.dp_size)]
        return max(loads) * len(loads) / sum(loads)

    def pack(
        self, sequences: Sequence[TrainSequence], empty_fields: Mapping[str, type] = NO_FIELDS
    ) -> list[PackedMicrobatch]:
        """This replica's sequences as micro-batches; one of padding alone if it has none.

        empty_fields: the fields of the one of padding, name → bool | float.
        """
        if not sequences:
            return [pack([], [], self.multiple, self.segment_multiple, empty_fields)]
        return pack_all(sequences, self.tokens_per_microbatch, self.multiple, self.segment_multiple)

    def pack_groups(
        self, groups: Sequence[Sequence[TrainSequence]], empty_fields: Mapping[str, type] = NO_FIELDS
    ) -> list[PackedMicrobatch]:
        """This replica's shard of the groups, each whole in one micro-batch, its sequences next to each other."""
        lengths = [sum(round_up(len(sequence), self.segment_multiple) for sequence in group) for group in groups]
        mine = self.shard(lengths)
        flat = [sequence for i in mine for sequence in groups[i]]
        starts = np.cumsum([0, *(len(groups[i]) for i in mine)]).tolist()
        bins = pack_into_microbatches([lengths[i] for i in mine], self.tokens_per_microbatch) or [[]]
        return [
            pack(
                flat,
                [index for k in indices for index in range(starts[k], starts[k + 1])],
                multiple=self.multiple,
                segment_multiple=self.segment_multiple,
                empty_fields=empty_fields,
            )
            for indices in bins
        ]
