"""This trainer rank's part in a push, and the group that the ranks agree over."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_vcppo.config import Config
from megatron_vcppo.config.network import node_network
from megatron_vcppo.config.placement import gather_size
from megatron_vcppo.mcore.rank_messages import RankGroup
from megatron_vcppo.rollout.node_folder import NodeFolder
from megatron_vcppo.rollout.rendezvous import SECRET
from megatron_vcppo.run.secret import read_secret
from megatron_vcppo.weight_sync.push_plan import SyncRole, role_in_stage
from megatron_vcppo.weight_sync.sync import WeightSync
from megatron_vcppo.weight_sync.transport import DiskTransport, HostTransport, NetworkTransport, Transport
from megatron_vcppo.weight_sync.turns import SleepingSync

if TYPE_CHECKING:  # a trainer without Megatron pushes, too
    from megatron_vcppo.mcore.runtime import Runtime

AGREEMENT_MARGIN_S = 120.0
"""What an agreement of all ranks may take beyond the longest thing that a rank does between two of them."""
SENDER_SHARE = 0.8
"""Of run.timeout_s, when a sender gives up at the latest: the tensor-parallel ranks that gather for it wait for it in
NCCL, whose watchdog ends them after run.timeout_s. An engine that hangs would take the trainer along."""


def role_of(runtime: "Runtime", max_senders: int) -> SyncRole:
    """The role of this rank among all of the trainer's."""
    return role_in_stage(
        pp_rank=runtime.pp_rank,
        pp_size=runtime.pp_size,
        tp_rank=runtime.tp_rank,
        tp_size=runtime.tp_size,
        replica=runtime.dp_rank * runtime.cp_size + runtime.cp_rank,
        num_replicas=runtime.dp_size * runtime.cp_size,
        max_senders=max_senders,
        ep_size=runtime.ep_size,
    )


def role_on_node(pp_rank: int, rank: int, local_rank: int, tp_size: int, ep_size: int = 1) -> SyncRole:
    """The role of a rank where every node holds a whole replica, whose ranks give it to the node's own engines."""
    return SyncRole(
        pp_rank=pp_rank,
        pp_size=1,
        takes_part=local_rank < gather_size(tp_size, ep_size),
        sender=local_rank if local_rank < tp_size else None,
        num_senders=tp_size,
        is_driver=rank == 0,
    )


def make_weight_sync(config: Config, rendezvous: Path, role: SyncRole, device: torch.device) -> WeightSync:
    """The pushes of a stage; collective. With transport: disk the weights pass through the rendezvous folder."""
    ranks = RankGroup(config.weight_sync.timeout_s + AGREEMENT_MARGIN_S)
    return WeightSync(config.weight_sync, rendezvous, role, ranks, _make_transport(config, rendezvous, role, device))


def make_sleeping_sync(
    config: Config, rendezvous: Path, role: SyncRole, device: torch.device, node: NodeFolder, uses_memory: bool
) -> SleepingSync:
    """The same for engines on the trainer's GPUs. uses_memory: the weights pass through the memory of each node."""
    ranks = RankGroup(config.weight_sync.timeout_s + AGREEMENT_MARGIN_S)
    transport: Transport
    if uses_memory:
        transport = HostTransport(node, rendezvous, _bucket_bytes(config, role), role, config.weight_sync.verify)
    else:
        transport = _make_transport(config, rendezvous, role, device, backend="gloo")
    return SleepingSync(config.weight_sync, rendezvous, role, ranks, transport)


def _make_transport(
    config: Config, rendezvous: Path, role: SyncRole, device: torch.device, backend: str | None = None
) -> Transport:
    settings, bucket_bytes = config.weight_sync, _bucket_bytes(config, role)
    if settings.transport == "disk":
        return DiskTransport(rendezvous / "weights", bucket_bytes, role, settings.verify)
    address, secret = node_network(config.cluster).address, partial(read_secret, rendezvous / SECRET)
    timeout_s = min(settings.timeout_s, SENDER_SHARE * config.run.timeout_s)
    return NetworkTransport(address, device, bucket_bytes, timeout_s, secret, backend, role, settings.verify)


def _bucket_bytes(config: Config, role: SyncRole) -> int:
    """Of one pipeline stage: receivers take a bucket of each at a time."""
    return config.weight_sync.bucket_mib * 2**20 // role.pp_size
