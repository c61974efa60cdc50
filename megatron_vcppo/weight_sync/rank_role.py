"""This trainer rank's part in a push, and the collective that the ranks agree over; reads torch.distributed only."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vcppo.config import Config
from megatron_vcppo.config.network import node_network
from megatron_vcppo.rollout.node_folder import NodeFolder
from megatron_vcppo.weight_sync.push_plan import SyncRole
from megatron_vcppo.weight_sync.sync import WeightSync
from megatron_vcppo.weight_sync.transport import DiskTransport, HostTransport, NetworkTransport, Transport
from megatron_vcppo.weight_sync.turns import SleepingSync

EXCHANGE_MARGIN_S = 120.0
"""What an exchange may take beyond the longest thing that a rank does between two of them."""
SENDER_SHARE = 0.8
"""Of run.timeout_s, when a sender gives up at the latest: the tensor-parallel ranks that gather for it wait for it in
NCCL, whose watchdog ends them after run.timeout_s. An engine that hangs would take the trainer along."""


def role_of(pp_rank: int, pp_size: int, tp_rank: int, dp_rank: int, cp_rank: int = 0) -> SyncRole:
    """The role of a rank by its coordinates."""
    takes_part = dp_rank == 0 and cp_rank == 0
    is_sender = takes_part and tp_rank == 0
    return SyncRole(
        pp_rank=pp_rank,
        pp_size=pp_size,
        takes_part=takes_part,
        is_sender=is_sender,
        is_driver=is_sender and pp_rank == 0,
    )


def role_on_node(pp_rank: int, rank: int, local_rank: int, tp_size: int) -> SyncRole:
    """The role of a rank where every node holds a whole replica and sends it to its own engines."""
    return SyncRole(
        pp_rank=pp_rank,
        pp_size=1,
        takes_part=local_rank < tp_size,
        is_sender=local_rank == 0,
        is_driver=rank == 0,
    )


def make_exchange(timeout_s: float) -> Callable[[Any], list[Any]]:
    """An all-gather of small objects over a separate gloo group (all ranks call this together)."""
    if not dist.is_initialized():
        return lambda value: [value]
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    size = dist.get_world_size()

    def exchange(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values

    return exchange


def make_weight_sync(config: Config, rendezvous: Path, role: SyncRole, device: torch.device) -> WeightSync:
    """The pushes of a stage; collective. With transport: disk the weights pass through the rendezvous folder."""
    exchange = make_exchange(config.weight_sync.timeout_s + EXCHANGE_MARGIN_S)
    return WeightSync(config.weight_sync, rendezvous, role, exchange, _make_transport(config, rendezvous, device))


def make_sleeping_sync(
    config: Config, rendezvous: Path, role: SyncRole, device: torch.device, node: NodeFolder, uses_memory: bool
) -> SleepingSync:
    """The same for engines on the trainer's GPUs. uses_memory: the weights pass through the memory of each node."""
    exchange = make_exchange(config.weight_sync.timeout_s + EXCHANGE_MARGIN_S)
    transport: Transport
    if uses_memory:
        transport = HostTransport(node, rendezvous, config.weight_sync.bucket_mib * 2**20)
    else:
        transport = _make_transport(config, rendezvous, device, backend="gloo")
    return SleepingSync(config.weight_sync, rendezvous, role, exchange, transport)


def _make_transport(config: Config, rendezvous: Path, device: torch.device, backend: str | None = None) -> Transport:
    settings = config.weight_sync
    bucket_bytes = settings.bucket_mib * 2**20
    if settings.transport == "disk":
        return DiskTransport(rendezvous / "weights", bucket_bytes)
    address = node_network(config.cluster).address
    timeout_s = min(settings.timeout_s, SENDER_SHARE * config.run.timeout_s)
    return NetworkTransport(address, device, bucket_bytes, timeout_s, backend)
