"""Tensors from some senders to many receivers: the byte stream of a weight push.

Every sender has a group of its own with all receivers (group.py), next to whatever default group a process has (a
trainer's world, an engine's). A stream is a row of buckets: large tensors as they are, small ones put together. All
senders of a stream hold the same tensors and make the same buckets. The first one announces each, by a JSON list of its
payloads; each sends its stripe of the bytes (stripes.py). So the links of all senders are busy at any time, and what a
receiver holds does not depend on their number.
"""

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from megatron_vcppo.integers import round_up
from megatron_vcppo.rollout.checksum import checksum, compare
from megatron_vcppo.rollout.group import Group, Lane, Transfer
from megatron_vcppo.rollout.stripes import ALIGNMENT, WHOLE, Stripe, pieces

ALONE_BYTES = 1 << 20
"""A tensor of this size is sent from where it is stored; smaller ones are copied together first."""


class TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    """One tensor in a payload."""

    name: str
    dtype: str
    shape: list[int]
    checksum: int | None = None
    """Of its bytes, where the receivers are to verify them."""


Bucket = list[tuple[list[TensorHeader], torch.Tensor]]
"""Payloads, each with the tensors in it."""


def send(
    group: Group,
    tensors: Iterator[tuple[str, torch.Tensor]],
    bucket_bytes: int,
    stripe: Stripe = WHOLE,
    verify: bool = False,
) -> int:
    """Send the stripe of (name, tensor) pairs to the group, and if it is the first one the end mark.

    Returns the bytes of all the tensors' stripe. Two buckets are held: one travels while the other is filled. A tensor
    must stay as it is until the one after the next bucket is requested. verify: with checksums, which receivers compare
    with what arrived. Raises RuntimeError if a receiver is gone or the deadline passes.
    """
    sender = BucketSender(group, bucket_bytes, stripe, verify)
    for name, tensor in tensors:
        sender.add(name, tensor)
    sender.finish()
    return sender.sent_bytes


class BucketSender:
    """Gathers one bucket while the one before travels."""

    def __init__(self, group: Group, bucket_bytes: int, stripe: Stripe, verify: bool) -> None:
        self.group, self.bucket_bytes, self.stripe = group, bucket_bytes, stripe
        self.announces = stripe.index == 0
        self.verify = verify and self.announces
        self.small: list[tuple[TensorHeader, torch.Tensor]] = []
        self.large: list[tuple[TensorHeader, torch.Tensor]] = []
        self.held_bytes = self.sent_bytes = 0
        self.in_flight: list[Transfer] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor of any dtype and shape into the bucket; a full bucket is sent."""
        flat = tensor.detach().to(self.group.device).contiguous().reshape(-1).view(torch.uint8)
        shape, check = list(tensor.shape), checksum(flat) if self.verify else None
        header = TensorHeader(name, str(tensor.dtype).removeprefix("torch."), shape, check)
        (self.large if flat.numel() >= ALONE_BYTES else self.small).append((header, flat))
        self.held_bytes += flat.numel()
        if self.held_bytes >= self.bucket_bytes:
            self.flush()

    def flush(self) -> None:
        """Announce the bucket and start sending the stripe, once the one before has arrived."""
        payloads = [([header], flat) for header, flat in self.large]
        if self.small:
            payloads.append(([header for header, _ in self.small], _put_together([flat for _, flat in self.small])))
        mine = [
            payloads[i][1][start:end] for i, start, end in pieces([flat.numel() for _, flat in payloads], self.stripe)
        ]
        self.sent_bytes += sum(piece.numel() for piece in mine)
        if self.announces:
            text = msgspec.json.encode([(headers, payload.numel()) for headers, payload in payloads])
            announced = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.group.device)
            mine = [torch.tensor([announced.numel()], device=self.group.device), announced, *mine]
        self._wait()
        self.in_flight = [self.group.broadcast(tensor) for tensor in mine]
        self.small, self.large, self.held_bytes = [], [], 0

    def finish(self) -> None:
        """Send what remains and the end mark (an announcement of size 0)."""
        if self.held_bytes:
            self.flush()
        self._wait()
        if self.announces:
            self.group.wait(self.group.broadcast(torch.zeros(1, dtype=torch.int64, device=self.group.device)))

    def _wait(self) -> None:
        for transfer in self.in_flight:
            self.group.wait(transfer)
        self.in_flight = []


def receive(streams: Sequence[Sequence[Group]]) -> Iterator[Bucket]:
    """Buckets as they arrive, each payload in new memory (uint8 [bytes], on the groups' device), until the end marks.

    streams: of each stream the groups of its senders, by the index of their stripes. One bucket of every stream that
    has not ended arrives at a time. All receivers take everything in one order, so that none waits for another.
    """
    active = list(streams)
    while True:
        sizes = _taken(
            [(senders[0], torch.empty(1, dtype=torch.int64, device=senders[0].device)) for senders in active]
        )
        arriving = [(senders, int(size)) for senders, size in zip(active, sizes, strict=True) if size.item()]
        active = [senders for senders, _ in arriving]
        if not active:
            break
        texts = _taken([(senders[0], _empty(size, senders[0])) for senders, size in arriving])
        buckets = [_bucket(text, senders[0]) for text, senders in zip(texts, active, strict=True)]
        _taken(list(_places(buckets, active)))
        yield from buckets
    for senders in streams:
        for group in senders:
            group.settle()


def _bucket(text: torch.Tensor, group: Group) -> Bucket:
    """An empty bucket as it was announced."""
    announced = msgspec.json.decode(text.cpu().numpy().tobytes(), type=list[tuple[list[TensorHeader], int]])
    return [(headers, _empty(num_bytes, group)) for headers, num_bytes in announced]


def _places(buckets: Sequence[Bucket], streams: Sequence[Sequence[Group]]) -> Iterator[tuple[Group, torch.Tensor]]:
    """Where the pieces of all stripes belong, one of each sender in turn: they arrive side by side."""
    rows = [
        [(group, bucket[i][1][start:end]) for i, start, end in pieces(sizes, Stripe(index, len(senders)))]
        for bucket, senders in zip(buckets, streams, strict=True)
        for sizes in [[payload.numel() for _, payload in bucket]]
        for index, group in enumerate(senders)
    ]
    for turn in itertools.zip_longest(*rows):
        yield from (place for place in turn if place is not None)


def _taken(places: Sequence[tuple[Group, torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors, filled."""
    transfers = [(group, group.broadcast(tensor)) for group, tensor in places]
    for group, transfer in transfers:
        group.wait(transfer)
    return [tensor for _, tensor in places]


def _empty(size: int, group: Group, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=group.device)


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
    """(name, tensor) pairs from buckets; the tensors, of their headers' dtype and shape, are views of the payloads.

    Raises RuntimeError with the name of a tensor that is not what its checksum says.
    """
    for bucket in buckets:
        for headers, payload in bucket:
            offset = 0
            for header in headers:
                dtype = getattr(torch, header.dtype)
                num_bytes = dtype.itemsize * torch.Size(header.shape).numel()
                tensor = payload[offset : offset + num_bytes].view(dtype).view(header.shape)
                compare(header.name, tensor, header.checksum)
                yield header.name, tensor
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
