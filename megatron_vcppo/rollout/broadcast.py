"""Tensors from one sender to many receivers over a process group of their own: the byte stream of a weight push.

A group is made beside whatever default group a process has (a trainer's world, an engine's), and only its
constructor knows gloo from NCCL. A stream is a row of buckets; each is announced by its sizes and holds a JSON list
of pieces, then their bytes. A tensor larger than a bucket travels in several pieces.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [begin, end) of one tensor."""

    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


ALIGNMENT = 64
"""Pieces start at multiples of this many bytes, so that every dtype can be viewed in place."""


@dataclass
class Group:
    """One sender (rank 0) and its receivers."""

    process_group: dist.ProcessGroup
    device: torch.device
    timeout_s: float
    store: dist.Store
    """Held: a process group does not keep its store alive."""

    def broadcast(self, tensor: torch.Tensor) -> dist.Work:
        """Start sending (rank 0) or filling (the others) a contiguous tensor on this group's device."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self.process_group.broadcast([tensor], options)

    def wait(self, work: dist.Work) -> None:
        """Wait until the tensor may be used again. Raises RuntimeError after the group's deadline."""
        if not work.wait(datetime.timedelta(seconds=self.timeout_s)):
            raise RuntimeError(f"broadcast not finished after {self.timeout_s:g} s")
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()


def serve_store(address: str, timeout_s: float) -> dist.TCPStore:
    """The meeting point of a new group, on a free port of address; its ``port`` is told to the receivers."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(address, 0, None, is_master=True, timeout=timeout, wait_for_workers=False)


def reach_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """A receiver's connection to the meeting point."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, None, is_master=False, timeout=timeout, wait_for_workers=False)


def join_group(
    store: dist.TCPStore, rank: int, world_size: int, backend: str, device: torch.device, timeout_s: float, address: str
) -> Group:
    """Make the group; returns when all ranks are there. Raises RuntimeError after timeout_s.

    address: this process's address on the network that the weights take (gloo; NCCL is told by its environment).
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    prefixed = dist.PrefixStore("weights", store)
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timeout
        return Group(dist.ProcessGroupGloo(prefixed, rank, world_size, options), torch.device("cpu"), timeout_s, store)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return Group(dist.ProcessGroupNCCL(prefixed, rank, world_size, options), device, timeout_s, store)


def send(group: Group, tensors: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int) -> int:
    """Send (name, tensor) pairs to the group and mark the end; returns the bytes sent.

    Two buckets are held: one travels while the other is filled. Raises RuntimeError if a receiver is gone or the
    deadline passes.
    """
    sender = BucketSender(group, bucket_bytes)
    for name, tensor in tensors:
        sender.add(name, tensor)
    sender.finish()
    return sender.sent_bytes


class BucketSender:
    """Fills one bucket while the other travels."""

    def __init__(self, group: Group, bucket_bytes: int) -> None:
        self.group = group
        self.buckets = [torch.empty(bucket_bytes, dtype=torch.uint8, device=group.device) for _ in range(2)]
        self.pieces: list[Piece] = []
        self.used = 0
        self.in_flight: list[dist.Work] = []
        self.kept: list[torch.Tensor] = []
        self.sent_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor into buckets, flushing each that is full."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        dtype, shape, begin = str(tensor.dtype).removeprefix("torch."), list(tensor.shape), 0
        while begin < flat.numel():
            if self.used >= self.buckets[0].numel():
                self.flush()
            end = min(flat.numel(), begin + self.buckets[0].numel() - self.used)
            self.buckets[0][self.used : self.used + end - begin].copy_(flat[begin:end])
            self.pieces.append(Piece(name, dtype, shape, begin, end))
            self.used = _aligned(self.used + end - begin)
            begin = end

    def flush(self) -> None:
        """Announce and start sending the filled bucket; wait for the one before."""
        self._wait()
        header = torch.frombuffer(bytearray(msgspec.json.encode(self.pieces)), dtype=torch.uint8)
        payload = self.buckets[0][: min(self.used, self.buckets[0].numel())]
        sizes = torch.tensor([header.numel(), payload.numel()])
        self.kept = [sizes.to(self.group.device), header.to(self.group.device)]
        self.in_flight = [self.group.broadcast(tensor) for tensor in (*self.kept, payload)]
        self.sent_bytes += payload.numel()
        self.buckets.reverse()
        self.pieces, self.used = [], 0

    def finish(self) -> None:
        """Send what is left and the end mark (a bucket of size 0)."""
        if self.pieces:
            self.flush()
        self._wait()
        end = torch.zeros(2, dtype=torch.int64, device=self.group.device)
        self.group.wait(self.group.broadcast(end))

    def _wait(self) -> None:
        for work in self.in_flight:
            self.group.wait(work)
        self.in_flight = []


def receive(group: Group) -> Iterator[tuple[list[Piece], torch.Tensor]]:
    """Buckets as they arrive, each in memory of its own (uint8, on the group's device), until the end mark."""
    while True:
        sizes = torch.empty(2, dtype=torch.int64, device=group.device)
        group.wait(group.broadcast(sizes))
        header_bytes, payload_bytes = sizes.tolist()
        if header_bytes == 0:
            return
        header = torch.empty(header_bytes, dtype=torch.uint8, device=group.device)
        payload = torch.empty(payload_bytes, dtype=torch.uint8, device=group.device)
        for work in [group.broadcast(header), group.broadcast(payload)]:
            group.wait(work)
        yield msgspec.json.decode(header.cpu().numpy().tobytes(), type=list[Piece]), payload


def unpack(buckets: Iterator[tuple[list[Piece], torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs from buckets: views where a tensor came in one piece, else put together in new memory."""
    parts: torch.Tensor | None = None
    for pieces, payload in buckets:
        offset = 0
        for piece in pieces:
            data = payload[offset : offset + piece.end - piece.begin]
            offset = _aligned(offset + piece.end - piece.begin)
            dtype = getattr(torch, piece.dtype)
            num_bytes = dtype.itemsize * torch.Size(piece.shape).numel()
            if piece.end - piece.begin < num_bytes:
                if parts is None:
                    parts = torch.empty(num_bytes, dtype=torch.uint8, device=payload.device)
                parts[piece.begin : piece.end] = data
                if piece.end < num_bytes:
                    continue
                data, parts = parts, None
            yield piece.name, data.view(dtype).view(piece.shape)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
