"""Context parallelism: a rank's share of a packed micro-batch, and the collectives that make tensors whole again.

A rank runs the model over its own tokens. Attention gathers keys and values; what the model reads out is gathered
before the loss, so that losses and metrics see whole sequences and know nothing of the split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vcppo.data.packing import PackedMicrobatch, rank_order


@dataclass(frozen=True)
class ContextShard:
    """Which of a micro-batch's T tokens this rank holds: T / size of them. Without context parallelism: all.

    ``take``, ``gather_keys`` and ``gather_outputs`` do nothing where size is 1; the last two are collective over the
    context-parallel ranks.
    """

    rank: int = 0
    size: int = 1
    order: Tensor | None = None
    """int64 [T]: see ``rank_order``."""
    places: Tensor | None = None
    """int64 [T]: the place of each token of the micro-batch in ``order``."""
    group: Any = None

    @property
    def mine(self) -> Tensor:
        """Places of this rank's tokens in the micro-batch: int64 [T / size]."""
        assert self.order is not None
        return self.order.view(self.size, -1)[self.rank]

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part, [T / size, …], of a tensor [T, …]."""
        return whole if self.size == 1 else whole[self.mine]

    def gather_keys(self, *local: Tensor) -> Sequence[Tensor]:
        """Tensors [T / size, …] of one shape as [T, …]; gradients that ranks have for a token are added up.

        For what every rank uses in another way: the keys and values of attention.
        """
        return local if self.size == 1 else _GatherKeys.apply(self, *local)

    def gather_outputs(self, *local: Tensor) -> Sequence[Tensor]:
        """Tensors [T / size] of one shape as [T]; each rank keeps its own gradient of its tokens.

        For what the loss reads: all ranks compute one and the same loss, so their gradients are not added up.
        """
        return local if self.size == 1 else _GatherOutputs.apply(self, *local)


WHOLE = ContextShard()
"""One rank, which holds every token."""


def shard_of(microbatch: PackedMicrobatch, device: torch.device) -> ContextShard:
    """This rank's share of a micro-batch, for tensors on ``device``."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return WHOLE
    order = rank_order(microbatch.cu_seqlens, size)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    rank, group = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_group()
    return ContextShard(rank, size, order.to(device), places.to(device), group)


@dataclass
class PackedParams(PackedSeqParams):
    """What Megatron's layers get about a packed micro-batch; segment borders are those of the whole one."""

    shard: ContextShard = WHOLE


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: ContextShard, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        return _gather(shard, local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shard: ContextShard = ctx.shard
        by_rank = torch.stack([grad[shard.order] for grad in grads], dim=1)
        mine = torch.empty((len(by_rank) // shard.size, *by_rank.shape[1:]), dtype=by_rank.dtype, device=by_rank.device)
        dist.reduce_scatter_tensor(mine, by_rank, group=shard.group)
        return None, *mine.unbind(1)


class _GatherOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: ContextShard, *local: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        ctx.set_materialize_grads(False)  # the entropy's gradient is skipped where no loss needs it
        return _gather(shard, local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if grad is None else ctx.shard.take(grad) for grad in grads)


def _gather(shard: ContextShard, local: Sequence[Tensor]) -> tuple[Tensor, ...]:
    mine = torch.stack(tuple(local), dim=1)
    by_rank = torch.empty((len(mine) * shard.size, *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(by_rank, mine, group=shard.group)
    return tuple(part[shard.places] for part in by_rank.unbind(1))
