"""Small values between ranks as msgpack: torch's own calls for objects unpickle what arrives, which runs code."""

from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist

T = TypeVar("T")


def broadcast_value(value: T, kind: type[T], src: int, group: Any = None, device: str | torch.device = "cpu") -> T:
    """The value of rank ``src``, on every rank of the group; collective.

    kind: what is read, such as ``list[str]``; msgspec.ValidationError for anything else. device: of the group's
    backend.
    """
    mine = msgspec.msgpack.encode(value) if dist.get_rank() == src else b""
    size = torch.tensor([len(mine)], device=device)
    dist.broadcast(size, src, group)
    content = torch.empty(int(size), dtype=torch.uint8, device=device)
    if mine:
        content.copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    dist.broadcast(content, src, group)
    return msgspec.msgpack.decode(content.cpu().numpy().tobytes(), type=kind)


def gather_values(value: T, kind: type[T], device: str | torch.device = "cpu") -> list[T] | None:
    """The values of all ranks by rank, on rank 0; None on the others; collective. kind, device: see above."""
    mine = torch.frombuffer(bytearray(msgspec.msgpack.encode(value)), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    main = dist.get_rank() == 0
    parts = [torch.empty_like(padded) for _ in sizes] if main else None
    dist.gather(padded, parts)
    if parts is None:
        return None
    contents = (part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True))
    return [msgspec.msgpack.decode(content, type=kind) for content in contents]
