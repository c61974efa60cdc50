"""Moves rows of a batch between replicas, and what a replica's leader has to its other ranks: arrays on the CPU.

A row is a run of elements of a tensor (along its first dimension), such as a rollout's tokens. Every rank knows the
length of each row, who has it and who gets it, so only the elements travel, each one to the replica that asks for it
and to no other.
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcppo.mcore import runtime

T = TypeVar("T")


def exchange_rows(values: Tensor, lengths: np.ndarray, holders: np.ndarray, takers: np.ndarray) -> Tensor:
    """The rows that this replica takes, one after the other, by rising index; collective over replicas.

    Args:
        values: [elements, …], the rows that this replica holds, by rising index.
        lengths: int64 [B]: elements of every row.
        holders: int64 [B]: the replica that holds each row.
        takers: int64 [B]: the replica that gets it; -1: none.
    """
    current = runtime.current()
    me, size = current.dp_rank, current.dp_size
    mine = np.flatnonzero(holders == me)
    starts = dict(zip(mine.tolist(), (lengths[mine].cumsum() - lengths[mine]).tolist(), strict=True))
    by_taker = [mine[takers[mine] == taker] for taker in range(size)]
    sent = _concatenated(
        [values[starts[i] : starts[i] + int(lengths[i])] for rows in by_taker for i in rows.tolist()], values
    )
    if size == 1:
        return sent
    wanted = np.flatnonzero(takers == me)
    by_holder = [wanted[holders[wanted] == holder] for holder in range(size)]
    received = values.new_empty((int(lengths[wanted].sum()), *values.shape[1:]))
    dist.all_to_all_single(
        received,
        sent,
        [int(lengths[rows].sum()) for rows in by_holder],
        [int(lengths[rows].sum()) for rows in by_taker],
        group=parallel_state.get_data_parallel_group_gloo(),
    )
    arrived = np.concatenate(by_holder)
    ends = lengths[arrived].cumsum()
    order = arrived.argsort()
    return _concatenated([received[int(ends[k] - lengths[arrived[k]]) : int(ends[k])] for k in order], values)


def gather_from_leaders(rows: np.ndarray) -> list[np.ndarray]:
    """What each replica's leader has, by replica, on every rank; collective over all ranks.

    rows: a small array [n] of one dtype on all ranks, n of any size; only the leaders' are read.
    """
    current = runtime.current()
    sizes = torch.zeros(current.dp_size, dtype=torch.int64)
    if current.is_leader:
        group = parallel_state.get_data_parallel_group_gloo()
        dist.all_gather_into_tensor(sizes, torch.tensor([rows.nbytes]), group=group)
    broadcast_in_replica(sizes)
    longest = int(sizes.max())
    gathered = torch.zeros(current.dp_size, longest, dtype=torch.uint8)
    if current.is_leader:
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: rows.nbytes] = torch.from_numpy(np.ascontiguousarray(rows).view(np.uint8))
        dist.all_gather_into_tensor(gathered.view(-1), padded, group=group)
    broadcast_in_replica(gathered)
    return [row[: int(size)].numpy().view(rows.dtype) for row, size in zip(gathered, sizes, strict=True)]


def values_of_leaders(value: T, kind: type[T]) -> list[T]:
    """What each replica's leader has, by replica, on every rank; collective. kind: what is read (rank_messages.py)."""
    mine = np.frombuffer(bytearray(msgspec.msgpack.encode(value)), dtype=np.uint8)
    return [msgspec.msgpack.decode(one.tobytes(), type=kind) for one in gather_from_leaders(mine)]


def broadcast_in_replica(tensor: Tensor) -> Tensor:
    """Fill a CPU tensor with that of the replica's leader; collective over the ranks of the replica."""
    group = runtime.current().replica_group
    if group is not None:
        dist.broadcast(tensor, group_src=0, group=group)
    return tensor


def _concatenated(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([*parts]) if parts else like.new_empty((0, *like.shape[1:]))
