"""Writes one component's tensors: planned with all ranks, written by threads of each rank, hashed on the way.

Megatron's own writer forks processes, which report through a further process; a thread needs neither, ends with its
rank, and its errors have a traceback. Writing spends its time in system calls and in hashing, outside Python's lock.
"""

import io
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StoragePrefix, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vcppo.errors import system_error
from megatron_vcppo.run.manifest import BLOCK_BYTES

FILES_PER_RANK = 2
"""Each is written by a thread."""


class ComponentSave:
    """One component's part of a save. The constructor and ``finish`` are collective; between them, threads write."""

    def __init__(self, state: dict[str, Any], folder: Path, staged: bool) -> None:
        """state: ShardedTensors to write, and what all ranks have alike, which the main rank writes at once.

        staged: copy this rank's tensors to host memory first, so that training may change them while threads write;
        otherwise each is copied when it is written.
        """
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

        Returns the manifest's records of this rank's files. Raises CheckpointException if any rank could not write,
        UserError if the disk was full or the like.
        """
        self.wait()
        try:
            for finalize in self._finalize:
                finalize()
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(cause, OSError) and (named := system_error(cause)):
                    raise named from None
            raise
        return self._writer.records


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron's plan of who writes what where, carried out by our writer."""

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        self.writer = _Writer(checkpoint_dir, thread_count=self.thread_count)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        (writer, metadata, ranks), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(state), self.writer, None, 0, planner=planner
        )
        if metadata is not None:  # on the main rank
            # Megatron would store all ranks' plans, for every rank to read, and never looks at them here.
            metadata.all_local_plans = None
        return AsyncRequest(None, (), [lambda: save_state_dict_async_finalize(writer, metadata, ranks)])


class _Writer(FileSystemWriter):
    """The file side of the plan on one rank."""

    can_run_decentralized_global_plan = True

    def prepare_decentralized_global_plan(self, local_plan: SavePlan) -> SavePlan:
        return replace(local_plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.buckets = _split_by_size_and_type(self.thread_count, plan.items)
        self.planner, self.prefix = planner, plan.storage_data.prefix
        self.results: list[WriteResult] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.errors: list[Any] = []

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

    def retrieve_write_results(self) -> Any:
        return self.errors[0] if self.errors else self.results

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
        except Exception as error:  # raised in ``finish``, on every rank
            cause: BaseException = error
            while cause.__context__ is not None:  # torch.save raises its own error at the end
                cause = cause.__context__
            self.errors.append(_wrap_exception(cause))


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
