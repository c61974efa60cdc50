"""Gives each replica the rollouts that it works on: a share of the batch, then its part of every minibatch."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_vcppo.data.packing import balance
from megatron_vcppo.data.rollout_share import (
    ExpertsFormat,
    RolloutShare,
    RolloutTable,
    RoutedExperts,
    rows_of,
    sampled_tokens,
    tokens_of,
)
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.row_exchange import broadcast_in_replica, exchange_rows, gather_from_leaders
from megatron_vcppo.records import RolloutPart


def replica_of_each(lengths: np.ndarray, num_replicas: int, among: Sequence[int] | None = None) -> np.ndarray:
    """Which replica works on each of B sequences, balanced by length: int64 [B], -1 for those not ``among`` them."""
    chosen = range(len(lengths)) if among is None else among
    replicas = np.full(len(lengths), -1, dtype=np.int64)
    for replica, indices in enumerate(balance([int(lengths[i]) for i in chosen], num_replicas)):
        replicas[[chosen[i] for i in indices]] = replica
    return replicas


def experts_format(arch: Architecture) -> ExpertsFormat:
    """How engines send the experts of a mixture."""
    assert arch.experts is not None, f"{arch.family} has no experts"
    return ExpertsFormat(arch.num_layers, arch.experts.per_token, arch.experts.number_bytes)


def share_out(part: RolloutPart, experts: ExpertsFormat | None = None) -> RolloutShare:
    """This replica's share of a batch, from what each leader has of it; collective over all ranks.

    part: scored rollouts; empty on ranks that are no leaders. experts: with routing replay, of those in the rollouts.
    """
    current = runtime.current()
    parts = gather_from_leaders(rows_of(part))
    rows, holders = np.concatenate(parts), np.repeat(np.arange(current.dp_size), [len(rows) for rows in parts])
    order = rows["place"].argsort(kind="stable")
    batch, holders = RolloutTable(rows[order]), holders[order]
    replicas = replica_of_each(batch.sequence_lengths, current.dp_size)
    mine = np.flatnonzero(replicas == current.dp_rank)
    token_ids = torch.empty(int(batch.sequence_lengths[mine].sum()), dtype=torch.int32)
    logprobs = torch.empty(int(batch.lengths[mine].sum()))
    sampled = torch.ones(len(logprobs), dtype=torch.bool)
    routed = torch.empty((len(token_ids), experts.row_bytes if experts is not None else 0), dtype=torch.uint8)
    if current.is_leader:
        here = tokens_of(part.rollouts)
        token_ids = exchange_rows(here[0], batch.sequence_lengths, holders, replicas)
        logprobs = exchange_rows(here[1], batch.lengths.numpy(), holders, replicas)
        if batch.has_observations:
            sampled = exchange_rows(sampled_tokens(part.rollouts), batch.lengths.numpy(), holders, replicas)
        if experts is not None:
            rows = RoutedExperts.of(part.rollouts, experts).rows
            routed = exchange_rows(rows, batch.sequence_lengths, holders, replicas)
    if batch.has_observations:
        sampled = broadcast_in_replica(sampled)
    token_ids, logprobs = broadcast_in_replica(token_ids), broadcast_in_replica(logprobs)
    routed_experts = None if experts is None else RoutedExperts(broadcast_in_replica(routed), experts)
    return RolloutShare(batch, replicas, mine, token_ids, logprobs, sampled, routed_experts)


def move(
    share: RolloutShare, fields: Mapping[str, Tensor], replicas: np.ndarray
) -> tuple[RolloutShare, dict[str, Tensor]]:
    """This replica's part of other shares, and the fields of its tokens; collective over replicas.

    fields: [N] of ``share``. replicas: int64 [B], who gets each rollout of the batch; -1: nobody.
    """
    lengths = share.batch.lengths.numpy()
    rows = np.flatnonzero(replicas == runtime.current().dp_rank)
    token_ids = exchange_rows(share.token_ids, share.batch.sequence_lengths, share.replicas, replicas)
    moved = {name: exchange_rows(field, lengths, share.replicas, replicas) for name, field in fields.items()}
    logprobs = moved.get("rollout_logprobs", torch.zeros(0))
    if share.batch.has_observations:
        sampled = exchange_rows(share.sampled, lengths, share.replicas, replicas)
    else:
        sampled = torch.ones(int(lengths[rows].sum()), dtype=torch.bool)
    routed = share.routed_experts
    if routed is not None:
        moved_rows = exchange_rows(routed.rows, share.batch.sequence_lengths, share.replicas, replicas)
        routed = RoutedExperts(moved_rows, routed.format)
    return RolloutShare(share.batch, replicas, rows, token_ids, logprobs, sampled, routed), moved
