"""Small values between ranks as msgpack: torch's own calls for objects unpickle what arrives, which runs code."""

import datetime
from typing import Any, TypeVar, cast

import msgspec
import torch
import torch.distributed as dist

from megatron_vcppo.mcore.group_members import prove_group

T = TypeVar("T")

MOST_TEXTS = 8
MOST_CHARACTERS = 4000
ROW_BYTES = 192
_LENGTH_BYTES = 8


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
    """The values of all ranks by rank, on rank 0, which alone holds them; None on the others; collective.

    kind, device: see above.
    """
    content = msgspec.msgpack.encode(value)
    mine = torch.frombuffer(bytearray(len(content).to_bytes(_LENGTH_BYTES, "big") + content), dtype=torch.uint8)
    longest = torch.tensor([len(mine)], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = torch.zeros(int(longest), dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(padded, parts)
    if parts is None:
        return None
    contents = (part.cpu().numpy().tobytes() for part in parts)
    return [msgspec.msgpack.decode(_without_length(content), type=kind) for content in contents]


def _without_length(content: bytes) -> bytes:
    return content[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "big")]


class RankGroup:
    """All ranks over a gloo group with its own deadline, for decisions and small values of known types.

    Without torch.distributed, a single process. Every method is collective; what it costs does not grow with the number
    of ranks but for the steps of an all-reduce.
    """

    def __init__(self, timeout_s: float) -> None:
        """timeout_s: of every call. Collective. UserError if a rank does not hold the run's secret."""
        self._group, self.rank, self.size = None, 0, 1
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            prove_group(self._group, "a group of all ranks")
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def barrier(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag: whether it is true on any rank."""
        return tuple(bool(one) for one in self._reduced([int(flag) for flag in flags], dist.ReduceOp.MAX))

    def sum(self, number: int) -> int:
        """Over all ranks."""
        return self._reduced([number], dist.ReduceOp.SUM)[0]

    def tell(self, value: T | None, kind: type[T]) -> T:
        """Rank 0's value, on every rank. kind: what is read, such as ``list[str]``."""
        return self._tell(value, kind, 0)

    def texts(self, text: str) -> list[tuple[int, str]]:
        """(rank, text) of the first MOST_TEXTS ranks whose text is not empty, each up to MOST_CHARACTERS."""
        found: list[tuple[int, str]] = []
        candidate = self.rank if text else self.size
        while len(found) < MOST_TEXTS:
            (first,) = self._reduced([candidate], dist.ReduceOp.MIN)
            if first == self.size:
                break
            found.append((first, self._tell(text[:MOST_CHARACTERS], str, first)))
            if first == self.rank:
                candidate = self.size
        return found

    def table(self, row: T | None, place: int, num_rows: int, kind: type[T]) -> list[T]:
        """Rows of which each is given by one rank, on every rank. row: this rank's, None if it has none.

        Raises ValueError for a row of more than ROW_BYTES as JSON.
        """
        content = torch.zeros(num_rows, ROW_BYTES, dtype=torch.uint8)
        if row is not None:
            encoded = msgspec.json.encode(row)
            if len(encoded) > ROW_BYTES:
                raise ValueError(f"a row of {len(encoded)} bytes; the most is {ROW_BYTES}")
            content[place, : len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        if self._group is not None:
            dist.all_reduce(content, group=self._group)
        return [msgspec.json.decode(one.tobytes().rstrip(b"\0"), type=kind) for one in content.numpy()]

    def _reduced(self, numbers: list[int], how: Any) -> list[int]:
        if self._group is None:
            return numbers
        found = torch.tensor(numbers)
        dist.all_reduce(found, how, group=self._group)
        return [int(one) for one in found]

    def _tell(self, value: T | None, kind: type[T], src: int) -> T:
        if self._group is None:
            return cast(T, value)
        return broadcast_value(cast(T, value), kind, src, self._group)
