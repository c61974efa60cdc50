"""Takes torch's collectives for objects, which unpickle what arrives, out of this process.

Megatron's optimizer calls one of them (``all_gather_object``), for values that msgpack holds as well; a library that
calls another one fails with its name. ``runtime.start`` calls ``install``.
"""

import hashlib
from typing import Any

import msgspec
import torch
import torch.distributed as dist

_NAMES = (
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
)


def install() -> None:
    """Safe to call twice."""
    for module in (dist, dist.distributed_c10d):
        for name in _NAMES:
            setattr(module, name, _refusal(name))
        module.all_gather_object = all_gather_values  # type: ignore[attr-defined]


def all_gather_values(object_list: list[Any], obj: Any, group: Any = None) -> None:
    """Fill the list with the values of all ranks: numbers, texts, None, and tuples of such; lists arrive as tuples.

    Where all ranks have the same value, which is the rule, nothing is gathered.
    """
    content = msgspec.msgpack.encode(obj)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    digest = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    ends = torch.tensor([digest, -digest, len(content)], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    largest, negated_smallest, longest = (int(end) for end in ends)
    if largest == -negated_smallest:
        object_list[:] = [_tuples(msgspec.msgpack.decode(content))] * len(object_list)
        return
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    size = torch.tensor([len(content)], device=device)
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in object_list]
    sizes = [torch.empty_like(size) for _ in object_list]
    dist.all_gather(sizes, size, group=group)
    dist.all_gather(parts, mine.to(device), group=group)
    contents = (part[: int(count)].cpu().numpy().tobytes() for part, count in zip(parts, sizes, strict=True))
    object_list[:] = [_tuples(msgspec.msgpack.decode(one)) for one in contents]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _refusal(name: str) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"torch.distributed.{name} unpickles what other ranks send: use mcore/rank_messages.py")

    return refuse
