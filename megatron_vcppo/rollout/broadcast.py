"""Tensors from one sender to many receivers over their own process group: the byte stream of a weight push.

A group is made next to whatever default group a process has (a trainer's world, an engine's), by group.py. A stream is
a row of buckets; each is announced by a JSON list of its payloads: large tensors as they are, small ones put together.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from megatron_vcppo.integers import round_up
from megatron_vcppo.rollout.group import Group, Lane

ALIGNMENT = 64
"""Pieces start at multiples of this many bytes, so that every dtype can be viewed in place."""
ALONE_BYTES = 1 << 20
"""A tensor of this size is sent from where it is stored; smaller ones are copied together first."""


class TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in a payload."""

    name: str
    dtype: str
    shape: list[int]


Bucket = list[tuple[list[TensorHeader], torch.Tensor]]
"""Payloads, each with the tensors in it."""


def send(group: Group, tensors: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int) -> int:
    """Send (name, tensor) pairs to the group and mark the end; returns the bytes sent.

    Two buckets are held: one travels while the other is filled. A tensor must stay as it is until the one after the
    next bucket is requested. Raises RuntimeError if a receiver is gone or the deadline passes.
    """
    sender = BucketSender(group, bucket_bytes)
    for name, tensor in tensors:
        sender.add(name, tensor)
    sender.finish()
    return sender.sent_bytes


class BucketSender:
    """Gathers one bucket while the one before travels."""

    def __init__(self, group: Group, bucket_bytes: int) -> None:
        self.group, self.bucket_bytes = group, bucket_bytes
        self.small: list[tuple[TensorHeader, torch.Tensor]] = []
        self.large: list[tuple[TensorHeader, torch.Tensor]] = []
        self.held_bytes = self.sent_bytes = 0
        self.in_flight: list[tuple[dist.Work, torch.Tensor]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor of any dtype and shape into the bucket; a full bucket is sent."""
        piece = TensorHeader(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        flat = tensor.detach().to(self.group.device).contiguous().reshape(-1).view(torch.uint8)
        (self.large if flat.numel() >= ALONE_BYTES else self.small).append((piece, flat))
        self.held_bytes += flat.numel()
        if self.held_bytes >= self.bucket_bytes:
            self.flush()

    def flush(self) -> None:
        """Announce the bucket and start sending it, once the one before has arrived."""
        payloads = [([piece], flat) for piece, flat in self.large]
        if self.small:
            payloads.append(([piece for piece, _ in self.small], _put_together([flat for _, flat in self.small])))
        header = msgspec.json.encode([(pieces, payload.numel()) for pieces, payload in payloads])
        announced = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(self.group.device)
        size = torch.tensor([announced.numel()], device=self.group.device)
        self._wait()
        row = [size, announced, *(payload for _, payload in payloads)]
        self.in_flight = [(self.group.broadcast(tensor), tensor) for tensor in row]
        self.sent_bytes += self.held_bytes
        self.small, self.large, self.held_bytes = [], [], 0

    def finish(self) -> None:
        """Send what remains and the end mark (an announcement of size 0)."""
        if self.held_bytes:
            self.flush()
        self._wait()
        self.group.wait(self.group.broadcast(torch.zeros(1, dtype=torch.int64, device=self.group.device)))

    def _wait(self) -> None:
        for work, _ in self.in_flight:
            self.group.wait(work)
        self.in_flight = []


def receive(group: Group) -> Iterator[Bucket]:
    """Buckets as they arrive, each payload in new memory (uint8 [bytes], on the group's device), until the end mark."""
    while True:
        size = torch.empty(1, dtype=torch.int64, device=group.device)
        group.wait(group.broadcast(size))
        if not size.item():
            return
        header = torch.empty(int(size.item()), dtype=torch.uint8, device=group.device)
        group.wait(group.broadcast(header))
        announced = msgspec.json.decode(header.cpu().numpy().tobytes(), type=list[tuple[list[TensorHeader], int]])
        bucket = [(pieces, torch.empty(n, dtype=torch.uint8, device=group.device)) for pieces, n in announced]
        for work in [group.broadcast(payload) for _, payload in bucket]:
            group.wait(work)
        yield bucket


def ahead(buckets: Iterator[Bucket], lane: Lane) -> Iterator[Bucket]:
    """The same buckets, the next one being received by a thread while the caller copies out of the current one.

    The thread works in the lane: on the caller's device, on a stream apart from the caller's.
    """
    done = object()
    slots: queue.Queue[Any] = queue.Queue(maxsize=1)

    def fetch() -> None:
        try:
            with lane.entered():
                for bucket in buckets:
                    slots.put(bucket)
            slots.put(done)
        except BaseException as error:
            slots.put(error)

    thread = threading.Thread(target=fetch, name="weights", daemon=True)
    thread.start()
    while (item := slots.get()) is not done:
        if isinstance(item, BaseException):
            raise item
        lane.hand_over(payload for _, payload in item)
        yield item
    thread.join()


def unpack(buckets: Iterator[Bucket]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs from buckets; the tensors, of their headers' dtype and shape, are views of the payloads."""
    for bucket in buckets:
        for pieces, payload in bucket:
            offset = 0
            for piece in pieces:
                dtype = getattr(torch, piece.dtype)
                num_bytes = dtype.itemsize * torch.Size(piece.shape).numel()
                yield piece.name, payload[offset : offset + num_bytes].view(dtype).view(piece.shape)
                offset = _aligned(offset + num_bytes)


def _put_together(flats: list[torch.Tensor]) -> torch.Tensor:
    together = flats[0].new_empty(sum(_aligned(flat.numel()) for flat in flats))
    offset = 0
    for flat in flats:
        together[offset : offset + flat.numel()].copy_(flat)
        offset = _aligned(offset + flat.numel())
    return together


def _aligned(offset: int) -> int:
    return round_up(offset, ALIGNMENT)
