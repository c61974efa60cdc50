"""Who takes part in a push and under which rank. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vcppo.config.placement import gather_size, senders_per_stage
from megatron_vcppo.rollout.messages import GroupAddress
from megatron_vcppo.rollout.rendezvous import Engine
from megatron_vcppo.rollout.stripes import Stripe


@dataclass(frozen=True)
class Target:
    """An engine that a push goes to."""

    engine: Engine
    num_workers: int


@dataclass(frozen=True)
class SyncRole:
    """What a trainer rank does in a push. All senders send at once: of each pipeline stage its layers, in stripes."""

    pp_rank: int
    pp_size: int
    takes_part: bool
    """The push reads its shard: a rank that it gathers with is a sender."""
    sender: int | None
    """Its place among the senders of its stage; None: it does not send."""
    num_senders: int
    """Of each stage."""
    is_driver: bool
    """It tells the engines what happens: the first sender of the first stage."""

    @property
    def is_sender(self) -> bool:
        """It talks to the engines."""
        return self.sender is not None

    @property
    def stripe(self) -> Stripe:
        """What it sends of its stage."""
        return Stripe(self.sender or 0, self.num_senders)


SINGLE = SyncRole(pp_rank=0, pp_size=1, takes_part=True, sender=0, num_senders=1, is_driver=True)
"""A trainer of one process."""


def role_in_stage(
    pp_rank: int,
    pp_size: int,
    tp_rank: int,
    tp_size: int,
    replica: int,
    num_replicas: int,
    max_senders: int,
    ep_size: int = 1,
) -> SyncRole:
    """The role of a rank by its coordinates; every pipeline stage has tp_size × num_replicas ranks.

    replica: counts those that hold the same weights, over data- and context-parallel ranks. Up to max_senders over all
    stages are spread evenly over the ranks of each, so that they are on as many nodes as can be.
    """
    num_ranks = tp_size * num_replicas
    num_senders = senders_per_stage(num_ranks, pp_size, max_senders)
    senders = [index * num_ranks // num_senders for index in range(num_senders)]
    rank, together = replica * tp_size + tp_rank, gather_size(tp_size, ep_size)
    return SyncRole(
        pp_rank=pp_rank,
        pp_size=pp_size,
        takes_part=any(sender // together == rank // together for sender in senders),
        sender=senders.index(rank) if rank in senders else None,
        num_senders=num_senders,
        is_driver=pp_rank == 0 and rank == 0,
    )


def first_ranks(targets: Sequence[Target], turn: int = 0) -> list[int]:
    """Rank of each engine's first worker in a sender's group; rank 0 is the sender.

    turn: the place in ``targets`` of the engine that comes first, so that the chains of several senders begin at
    different engines.
    """
    ranks, rank = [0] * len(targets), 1
    for place in range(len(targets)):
        index = (turn + place) % len(targets)
        ranks[index] = rank
        rank += targets[index].num_workers
    return ranks


def world_size(targets: Sequence[Target]) -> int:
    """Ranks of a sender's group: the sender and all workers of all engines."""
    return 1 + sum(target.num_workers for target in targets)


@dataclass(frozen=True, order=True)
class MeetingPoint:
    """Where a sender's group meets."""

    pp_rank: int
    sender: int
    address: str
    port: int


def streams_of(targets: Sequence[Target], points: Sequence[MeetingPoint]) -> list[list[list[GroupAddress]]]:
    """For each target what it receives: of each pipeline stage the groups of the senders, both in order."""
    size, ordered = world_size(targets), sorted(points)
    ranks = [first_ranks(targets, turn) for turn in range(len(ordered))]
    return [
        [
            [
                GroupAddress(point.address, point.port, ranks[turn][index], size)
                for turn, point in enumerate(ordered)
                if point.pp_rank == pp_rank
            ]
            for pp_rank in sorted({point.pp_rank for point in ordered})
        ]
        for index in range(len(targets))
    ]
