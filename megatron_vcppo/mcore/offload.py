"""What a model holds on its device, moved to host memory and back: for engines that use the same GPU in between.

Works on storages, not on tensors: a storage is emptied in place and filled again, so every view of it (parameters in
Megatron's buffers, shards of the distributed optimizer, buckets of gradients) stays what it was. Megatron's own
``offload_to_cpu`` of optimizers gives parameters new storages instead, which cuts shards off the buffers that they are
views of, and its grad and param buffers know nothing of models without the distributed optimizer.

A view of an empty storage must not be used: ``check_resident`` raises before a kernel fails.
"""

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_vcppo.mcore.optimizer import chained_optimizers

Storage: TypeAlias = torch.UntypedStorage

PINNED_BYTES = 1 << 20
"""Smallest storage whose host copy is page-locked."""


@dataclass
class Parked:
    """A storage that was emptied."""

    storage: Storage
    num_bytes: int
    host: torch.Tensor | None
    """Its bytes; None: they are not kept, and it comes back as zeros."""


class HostMemory:
    """The storages that are in host memory now. Host buffers are kept from one move to the next."""

    def __init__(self) -> None:
        self.parked: dict[int, Parked] = {}
        self.buffers: dict[int, torch.Tensor] = {}

    def take(self, storages: Iterable[Storage], keep: bool = True) -> int:
        """Empty these storages; keep: their bytes are in host memory then. Returns the bytes that are free.

        One may come twice: models can share weights.
        """
        taken = []
        for storage in {storage._cdata: storage for storage in storages}.values():
            if storage.nbytes() and storage._cdata not in self.parked:
                host = self._copy(storage) if keep else None
                taken.append(Parked(storage, storage.nbytes(), host))
        _synchronize()
        for parked in taken:
            parked.storage.resize_(0)
            self.parked[parked.storage._cdata] = parked
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # another process takes it
        return sum(parked.num_bytes for parked in taken)

    def give_back(self, storages: Iterable[Storage] | None = None) -> int:
        """Fill these storages again, or every one; returns the bytes."""
        wanted = self.parked.keys() if storages is None else {storage._cdata for storage in storages}
        returned = [parked for key, parked in self.parked.items() if key in wanted]
        for parked in returned:
            parked.storage.resize_(parked.num_bytes)
            view = _bytes_of(parked.storage)
            view.zero_() if parked.host is None else view.copy_(parked.host, non_blocking=True)
        _synchronize()
        for parked in returned:
            del self.parked[parked.storage._cdata]
        return sum(parked.num_bytes for parked in returned)

    def _copy(self, storage: Storage) -> torch.Tensor:
        buffer = self.buffers.get(storage._cdata)
        if buffer is None or buffer.numel() != storage.nbytes():
            buffer = self.buffers[storage._cdata] = _host_buffer(storage.nbytes())
        return buffer.copy_(_bytes_of(storage), non_blocking=True)


def weights(module: torch.nn.Module) -> list[Storage]:
    """Storages of the parameters; with the distributed optimizer these are Megatron's few large buffers."""
    return _unique(parameter.data for parameter in module.parameters())


def gradients(ddp: DistributedDataParallel) -> list[Storage]:
    """Storages of Megatron's gradient buffers; a train step begins with zeroing them."""
    return _unique(buffer.grad_data for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers])


def optimizer_state(optimizer: MegatronOptimizer, module: torch.nn.Module) -> list[Storage]:
    """Storages of moments and float32 main parameters; not of parameters that the model computes with itself."""
    tensors = []
    for chained in chained_optimizers(optimizer):
        for group in chained.optimizer.param_groups:
            tensors += [parameter.data for parameter in group["params"]]
        for state in chained.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    own = weights(module)
    known = {storage._cdata for storage in own}
    return [s for s in _unique(tensors) if s._cdata not in known and all(s.device == w.device for w in own[:1])]


def drop_fp8_copies(module: torch.nn.Module) -> None:
    """Free the 8-bit weights that Transformer Engine's layers keep from pass to pass; the next pass makes them again.

    They are as large as the weights where backward passes need them transposed, too.
    """
    for part in module.modules():
        getattr(part, "_fp8_workspaces", {}).clear()


def check_resident(parts: Mapping[str, list[Storage]]) -> None:
    """Raises RuntimeError if any of these is in host memory; parts: ``Runner.storages``."""
    if away := [part for part, storages in parts.items() if any(storage.nbytes() == 0 for storage in storages)]:
        raise RuntimeError(f"{' and '.join(away)} of the model are in host memory: it is the engines' turn on the GPU")


def _unique(tensors: Iterable[torch.Tensor]) -> list[Storage]:
    """The storages of tensors with elements, each once, in order."""
    return list({s._cdata: s for s in (t.untyped_storage() for t in tensors if t.numel())}.values())


def _bytes_of(storage: Storage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _host_buffer(num_bytes: int) -> torch.Tensor:
    """Host memory of this size; a large one is page-locked for CUDA, in pages that it shares with nothing else.

    torch's allocator of page-locked memory would round the size up to a power of two.
    """
    if not torch.cuda.is_available() or num_bytes < PINNED_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    buffer = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    if code := int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), num_bytes, 0)):
        raise RuntimeError(f"cudaHostRegister of {num_bytes} bytes of host memory failed with CUDA error {code}")
    return buffer


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
