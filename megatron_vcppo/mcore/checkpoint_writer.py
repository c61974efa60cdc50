"""Writes one component's tensors: by threads of each rank, hashed on the way; the main rank then lists all chunks.

Megatron's own writer forks processes, which report through a further process; a thread needs neither, ends with its
rank, and its errors have a traceback. Writing spends its time in system calls and in hashing, outside Python's lock.
Megatron's plan gathers pickled objects, before the writing and after it. Here a rank plans alone (boxes overlap with
none of another rank), and what it wrote travels once, as msgpack.
"""

import io
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo, _write_item
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vcppo.errors import PASSING, system_error
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.rank_messages import gather_values
from megatron_vcppo.run.manifest import BLOCK_BYTES

FILES_PER_RANK = 2
"""Each is written by a thread."""


class ComponentSave:
    """One component's part of a save. The constructor and ``finish`` are collective; between them, threads write."""

    def __init__(self, state: dict[str, Any], folder: Path, staged: bool, started: float) -> None:
        """state: ShardedTensors to write, and what all ranks have alike, which the main rank writes at once.

        staged: copy this rank's tensors to host memory first, so that training may change them while threads write;
        otherwise each is copied when it is written. started: when the save began, by time.monotonic().
        """
        self._started = started
        self.seconds = 0.0
        """From the start until the slowest rank had written; on the main rank, once finished."""
        strategy = _Strategy("torch_dist", 1, thread_count=FILES_PER_RANK)
        request = dist_checkpointing.save(
            state, str(folder), strategy, validate_access_integrity=False, async_sharded_save=True
        )
        assert request is not None
        self._writer, self._finalize = strategy.writer, request.finalize_fns
        self._threads = self._writer.start(staged)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's threads are at work."""
        return any(thread.is_alive() for thread in self._threads)

    def wait(self) -> None:
        """Until this rank has written."""
        for thread in self._threads:
            thread.join()

    def finish(self) -> Mapping[str, Mapping[str, Any]]:
        """Once this rank has written: gather the places of all ranks' chunks, and store them.

        Returns the manifest's records of this rank's files. Raises RuntimeError on every rank if any could not write,
        UserError instead, on the main rank and where it was, if the disk was full or the like.
        """
        self.wait()
        failure, chunks = self._writer.failure(), self._writer.chunks()
        seconds = self._writer.ended - self._started
        parts = gather_values(_Part(chunks, failure, seconds), _Part, runtime.device())
        found = [part.failure for part in parts or () if part.failure is not None]
        if runtime.any_rank(failure is not None):
            raise (found[0] if found else failure or _Failure("on another rank")).as_error()
        if parts is not None:
            listed = _metadata_of([chunk for part in parts for chunk in part.chunks])
            places = [
                WriteResult(chunk.index, chunk.length, _StorageInfo(chunk.file, chunk.offset, chunk.length))
                for part in parts
                for chunk in part.chunks
            ]
            self._writer.finish(listed, [places])
            self.seconds = max(part.seconds for part in parts)
        for finalize in self._finalize:
            finalize()
        return self._writer.records


class _Chunk(msgspec.Struct, frozen=True):
    """A box of a global tensor, and where it was written."""

    key: str
    shape: list[int]
    """Of the global tensor."""
    dtype: str
    offsets: list[int]
    sizes: list[int]
    file: str
    offset: int
    length: int

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, torch.Size(self.offsets))


class _Failure(msgspec.Struct, frozen=True):
    """Why a rank could not write."""

    text: str
    number: int = 0
    """errno of an OSError, with its file."""
    file: str | None = None

    def as_error(self) -> Exception:
        error = OSError(self.number, os.strerror(self.number), self.file)
        if self.number in PASSING:
            return error
        return system_error(error) or RuntimeError(f"writing a checkpoint failed: {self.text}")


class _Part(msgspec.Struct, frozen=True):
    """What a rank wrote."""

    chunks: list[_Chunk]
    failure: _Failure | None
    seconds: float
    """By its own clock, as clocks of nodes differ."""


def _metadata_of(chunks: list[_Chunk]) -> Metadata:
    """The table of tensors from which loads find the boxes that they need."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for chunk in chunks:
        if chunk.key not in tensors:
            dtype = getattr(torch, chunk.dtype)
            tensors[chunk.key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(chunk.shape), [])
        tensors[chunk.key].chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    return Metadata({**tensors})


class _Strategy(TorchDistSaveShardedStrategy):
    """What of a state this rank writes, by Megatron's rules, handed to our writer."""

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(state), is_coordinator=dist.get_rank() == 0)
        self.writer = _Writer(checkpoint_dir, planner, thread_count=self.thread_count)
        return AsyncRequest(None, (), [])


class _Writer(FileSystemWriter):
    """The files of one rank."""

    def __init__(self, folder: Path, planner: SavePlanner, thread_count: int) -> None:
        super().__init__(folder, thread_count=thread_count)
        self.set_up_storage_writer(is_coordinator=dist.get_rank() == 0)
        self.items: list[WriteItem] = planner.create_local_plan().items
        self.buckets = _split_by_size_and_type(self.thread_count, self.items)
        self.planner, self.prefix = planner, f"__{dist.get_rank()}_"
        self.results: list[WriteResult] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.errors: list[BaseException] = []
        self.ended = time.monotonic()
        """When the last thread had written."""

    def start(self, staged: bool) -> list[threading.Thread]:
        """Copy the tensors to host memory if ``staged``; then write every file in a thread."""
        threads = []
        for i, bucket in enumerate(self.buckets):
            items: list[tuple[WriteItem, Any]] = [(item, self.planner.resolve_data(item)) for item in bucket]
            if staged:
                items = [(item, data.to("cpu", copy=True) if _is_tensor(data) else data) for item, data in items]
            if items:
                name = f"{self.prefix}{i}.distcp"
                threads.append(threading.Thread(target=self._write, args=(name, items, _cuda_device()), name=name))
        del self.buckets, self.planner  # which hold the tensors
        for thread in threads:
            thread.start()
        return threads

    def failure(self) -> _Failure | None:
        """The first one of this rank's threads."""
        if not self.errors:
            return None
        error = self.errors[0]
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            return _Failure(text, error.errno or 0, error.filename)
        return _Failure(text)

    def chunks(self) -> list[_Chunk]:
        """What was written."""
        boxes = {item.index: item.tensor_data for item in self.items}
        found = []
        for result in self.results:
            box, place = boxes[result.index], result.storage_data
            assert box is not None, f"{result.index.fqn} is no tensor"
            dtype = str(box.properties.dtype).removeprefix("torch.")
            offsets, sizes = [*box.chunk.offsets], [*box.chunk.sizes]
            numbers = place.relative_path, place.offset, place.length
            found.append(_Chunk(result.index.fqn, [*box.size], dtype, offsets, sizes, *numbers))
        return found

    def _write(self, name: str, items: list[tuple[WriteItem, Any]], device: int | None) -> None:
        if device is not None:  # a thread begins with the first GPU, where this rank has no business
            torch.cuda.set_device(device)
        try:
            with _HashedFile(Path(self.path) / name) as stream:
                while items:
                    item, data = items.pop(0)
                    if _is_tensor(data):
                        data = _alone_on_host(data)
                    result = _write_item(self.transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)
                    self.results.append(result)
                    del data  # before the next one is copied
            self.records[name] = stream.record()
            self.ended = time.monotonic()
        except Exception as error:  # raised in ``finish``, on every rank
            cause: BaseException = error
            while cause.__context__ is not None:  # torch.save raises its own error at the end
                cause = cause.__context__
            self.errors.append(cause)


class _HashedFile(io.RawIOBase):
    """A new file that is hashed as it is written, and synced when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self._size = path, xxhash.xxh3_128(), 0
        self._file = open(path, "wb")  # noqa: SIM115

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            if not threading.main_thread().is_alive():
                raise RuntimeError(f"{self._path}: this rank ended before it was written")
            block = view[start : start + BLOCK_BYTES]
            self._digest.update(block)
            try:
                self._file.write(block)
            except OSError as error:
                error.filename = str(self._path)
                raise
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def close(self) -> None:
        super().close()
        with self._file:
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())

    def record(self) -> dict[str, Any]:
        return {"size": self._size, "xxh3": self._digest.hexdigest()}


def _is_tensor(data: Any) -> bool:
    return isinstance(data, Tensor)


def _alone_on_host(tensor: Tensor) -> Tensor:
    """In host memory, in its own storage, since torch.save writes whole storages."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _cuda_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None
