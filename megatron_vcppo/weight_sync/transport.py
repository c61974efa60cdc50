"""How the bytes travel: broadcast over a group of each sender and all workers, or files in a shared folder."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.distributed import TCPStore
from typing_extensions import override

from megatron_vcppo.rollout.broadcast import send
from megatron_vcppo.rollout.group import Deadline, Group, join_group, serve_store
from megatron_vcppo.rollout.node_folder import NodeFolder, weights_path
from megatron_vcppo.rollout.weight_files import write_file
from megatron_vcppo.weight_sync.push_plan import SINGLE, SyncRole, Target, world_size

Tensors = Iterator[tuple[str, torch.Tensor]]


class Transport(Protocol):
    """One sender's side of a push. Every call may raise; ``close`` then makes the next push start afresh."""

    backend: str
    """The word that tells an engine how to receive: gloo, nccl or disk."""
    live: bool
    """Engines receive while the sender sends, not afterwards; what is not live stays there until the next push or
    ``drop``."""

    def folder(self, policy_version: int, node: int) -> str:
        """Where the engines of a node find the weights; "" if not in a folder."""

    def meet(self, targets: Sequence[Target]) -> tuple[str, int]:
        """Open the meeting point for these engines; returns its address and port."""

    def connect(self, targets: Sequence[Target]) -> None:
        """Wait for all of them; no sender sends before all have connected."""

    def send(self, tensors: Tensors, policy_version: int) -> int:
        """Send this sender's part of its stage's tensors; returns the number of bytes."""

    def close(self) -> None:
        """Forget the engines."""

    def drop(self) -> None:
        """Forget what was sent."""


class NetworkTransport(Transport):
    """Broadcast by gloo or NCCL. The group is kept from push to push while the engines are the same."""

    live = True

    def __init__(
        self,
        address: str,
        device: torch.device,
        bucket_bytes: int,
        timeout_s: float,
        secret: Callable[[], str],
        backend: str | None = None,
        role: SyncRole = SINGLE,
        verify: bool = False,
    ) -> None:
        """secret: reads what the receivers must hold, too (run/secret.py), when they are met.

        backend: gloo or nccl; default: by the device. Over gloo, tensors of a GPU pass through host memory.
        """
        self.secret = secret
        self.stripe, self.verify = role.stripe, verify
        self.address, self.device, self.bucket_bytes, self.timeout_s = address, device, bucket_bytes, timeout_s
        self.backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        self.deadline = Deadline(timeout_s)
        """Of the push under way: from its meeting to its last tensor."""
        self.group: Group | None = None
        self.store: TCPStore | None = None
        self.targets: list[Target] = []

    @override
    def folder(self, policy_version: int, node: int) -> str:
        return ""

    @override
    def meet(self, targets: Sequence[Target]) -> tuple[str, int]:
        if self.targets != list(targets):
            self.close()
            self.targets = list(targets)
            self.store = serve_store(self.address, self.timeout_s)
        self.deadline = Deadline(self.timeout_s)
        assert self.store is not None
        return self.address, self.store.port

    @override
    def connect(self, targets: Sequence[Target]) -> None:
        if self.group is None:
            assert self.store is not None
            size = world_size(targets)
            seconds = self.deadline.left_s()
            self.group = join_group(
                self.store, 0, size, self.backend, self.device, seconds, self.address, self.secret()
            )
        self.group.deadline = self.deadline

    @override
    def send(self, tensors: Tensors, policy_version: int) -> int:
        assert self.group is not None
        return send(self.group, tensors, self.bucket_bytes, self.stripe, self.verify)

    @override
    def close(self) -> None:
        group, self.group, self.store, self.targets = self.group, None, None, []
        if group is not None:
            group.close()

    @override
    def drop(self) -> None:
        pass


class DiskTransport(Transport):
    """safetensors files in ``root/version_N``; every engine reads them. The versions before are removed.

    The senders of a stage write one bucket, a file, after the other in turn.
    """

    backend, live = "disk", False

    def __init__(self, root: Path, bucket_bytes: int, role: SyncRole = SINGLE, verify: bool = False) -> None:
        self.root, self.bucket_bytes, self.role, self.verify = root, bucket_bytes, role, verify

    @override
    def folder(self, policy_version: int, node: int) -> str:
        return str(self._folder(policy_version))

    def _folder(self, policy_version: int) -> Path:
        return self.root / f"version_{policy_version}"

    @override
    def meet(self, targets: Sequence[Target]) -> tuple[str, int]:
        return "", 0

    @override
    def connect(self, targets: Sequence[Target]) -> None:
        if self.role.pp_rank == self.role.sender == 0 and self.root.exists():
            shutil.rmtree(self.root)

    @override
    def send(self, tensors: Tensors, policy_version: int) -> int:
        folder, stripe = self._folder(policy_version), self.role.stripe
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shard: dict[str, torch.Tensor] = {}
        held = sent = number = 0

        def finish() -> None:
            nonlocal held, sent, number
            if shard:
                write_file(folder / f"stage_{self.role.pp_rank}_{number:05d}.safetensors", shard, self.verify)
                sent += held
            shard.clear()
            held, number = 0, number + 1

        for name, tensor in tensors:
            if number % stripe.count == stripe.index:
                shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            held += tensor.nbytes
            if held >= self.bucket_bytes:
                finish()
        finish()
        return sent

    @override
    def close(self) -> None:
        pass

    @override
    def drop(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


class HostTransport(DiskTransport):
    """The same in the memory of each node: its ranks write, its engines read. For engines on the trainer's GPUs.

    CUDA IPC would spare the copies through host memory. But its handles are good on one GPU only, while an engine's
    worker there needs shards cut otherwise than the rank's: every rank would gather whole tensors, on every GPU.
    """

    def __init__(
        self, own: NodeFolder, rendezvous: Path, bucket_bytes: int, role: SyncRole = SINGLE, verify: bool = False
    ) -> None:
        super().__init__(own.weights, bucket_bytes, role, verify)
        self.rendezvous = rendezvous

    @override
    def folder(self, policy_version: int, node: int) -> str:
        return str(weights_path(self.rendezvous, node) / f"version_{policy_version}")
