"""Who takes part in a push and under which rank. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vcppo.rollout.messages import GroupAddress
from megatron_vcppo.rollout.rendezvous import Engine


@dataclass(frozen=True)
class Target:
    """An engine that a push goes to."""

    engine: Engine
    num_workers: int


@dataclass(frozen=True)
class SyncRole:
    """What a trainer rank does in a push. Pipeline stages send one after the other, each its own layers."""

    pp_rank: int
    pp_size: int
    takes_part: bool
    """It holds a shard that the push reads: it belongs to the first data-parallel replica."""
    is_sender: bool
    """It talks to the engines for its stage: the first tensor-parallel rank of those that take part."""
    is_driver: bool
    """It tells the engines what happens: the sender of the first stage."""


def first_ranks(targets: Sequence[Target]) -> list[int]:
    """Rank of each engine's first worker in every stream's group; rank 0 is the sender."""
    ranks, rank = [], 1
    for target in targets:
        ranks.append(rank)
        rank += target.num_workers
    return ranks


def world_size(targets: Sequence[Target]) -> int:
    """Ranks of a stream's group: the sender and all workers of all engines."""
    return 1 + sum(target.num_workers for target in targets)


def streams_of(targets: Sequence[Target], meeting_points: Sequence[tuple[str, int]]) -> list[list[GroupAddress]]:
    """For each target the streams that it receives, in sending order; meeting_points are (address, port) by stage."""
    size = world_size(targets)
    return [
        [GroupAddress(address, port, rank, size) for address, port in meeting_points] for rank in first_ranks(targets)
    ]
