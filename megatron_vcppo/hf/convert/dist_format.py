"""Megatron's "torch_dist" checkpoints on disk: where tensors' chunks are stored, and writing such a folder's frame.

The folder holds ``metadata.json`` (the backend), ``common.pt`` (what is not sharded), ``.metadata`` (a pickled
torch.distributed.checkpoint Metadata: per key the global size, the chunks, and for each chunk file, offset, length)
and ``*.distcp`` files, in which every chunk is one torch.save archive. A tensor's bytes are uncompressed inside its
archive, so chunks are read and written in place, without a process group and without loading them.
"""

import functools
import json
import math
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import skip_data

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.convert.checkpoint_metadata import METADATA_NAME, read_metadata
from megatron_vcppo.hf.convert.copying import allocate
from megatron_vcppo.run.files import open_file

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """A box of a global tensor: ``sizes`` from ``offsets`` on, row-major at byte ``data_offset`` of ``path``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    data_offset: int


@dataclass(frozen=True)
class GlobalTensor:
    """One key of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class NewChunk:
    """A chunk that is to be written to ``file_name``."""

    key: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file_name: str


def read_model(folder: Path, skipped: tuple[str, ...] = ("optimizer.",)) -> dict[str, GlobalTensor]:
    """All tensors of the model in a checkpoint (without optimizer state), with their chunks' places.

    skipped: what the keys of other tensors begin with.

    Raises UserError if it is not such a folder or a chunk is not a plain contiguous tensor.
    """
    metadata = read_metadata(folder)
    tensors = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or key.startswith(skipped):
            continue
        if missing := [
            chunk for chunk in entry.chunks if MetadataIndex(key, chunk.offsets) not in metadata.storage_data
        ]:
            raise UserError(f"{folder}: damaged checkpoint metadata: {len(missing)} chunks of {key} are nowhere")
        places = (metadata.storage_data[MetadataIndex(key, chunk.offsets)] for chunk in entry.chunks)
        chunks = [
            _locate(folder, place, key, chunk, entry.properties.dtype)
            for chunk, place in zip(entry.chunks, places, strict=True)
        ]
        tensors[key] = GlobalTensor(tuple(entry.size), entry.properties.dtype, tuple(chunks))
    return tensors


def check_keys(checkpoint: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, GlobalTensor]) -> None:
    """Raises UserError that lists every missing, unexpected, misshaped or incomplete key, if there is one."""
    problems = [*_problems(expected, stored)]
    if problems:
        raise UserError(
            f"{checkpoint}: tensors do not match the architecture:\n" + "\n".join(f"  {text}" for text in problems)
        )


def _problems(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, GlobalTensor]) -> Iterator[str]:
    yield from (f"missing: {key}" for key in expected if key not in stored)
    yield from (f"unexpected: {key}" for key in stored if key not in expected)
    for key, shape in expected.items():
        if key not in stored:
            continue
        if stored[key].shape != shape:
            yield f"misshaped: {key} is {list(stored[key].shape)}, should be {list(shape)}"
        elif sum(math.prod(chunk.sizes) for chunk in stored[key].chunks) != math.prod(shape):
            yield f"incomplete: {key}: its chunks do not add up to {list(shape)}"


def write_frame(folder: Path, new_chunks: Sequence[NewChunk]) -> list[Chunk]:
    """Write everything of a checkpoint but the chunks' bytes; returns, in the same order, where those go."""
    ends: dict[str, int] = {}
    storage = {}
    chunks = []
    for new in new_chunks:
        start = ends.get(new.file_name, 0)
        head, tail = _archive(new.sizes, new.dtype)
        length = len(head) + math.prod(new.sizes) * new.dtype.itemsize + len(tail)
        ends[new.file_name] = start + length
        storage[MetadataIndex(new.key, torch.Size(new.offsets))] = _StorageInfo(new.file_name, start, length)
        chunks.append(Chunk(new.offsets, new.sizes, folder / new.file_name, start + len(head)))
    for file_name, size in ends.items():
        allocate(folder / file_name, size)
    _write_archives(chunks, new_chunks)
    metadata = Metadata(
        state_dict_metadata={**_tensor_metadata(new_chunks)},
        planner_data=None,
        storage_data=storage,
        storage_meta=StorageMeta(),
    )
    with open(folder / METADATA_NAME, "xb") as stream:
        pickle.dump(metadata, stream)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
    return chunks


def _locate(folder: Path, place: _StorageInfo, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Chunk:
    """Find a chunk's bytes by loading its archive without its data."""
    path, sizes = folder / place.relative_path, tuple(chunk.sizes)
    try:
        with open_file(path) as stream, FakeTensorMode():
            view = cast(IO[bytes], _create_file_view(stream, place.offset, place.length))
            tensor = torch.load(view, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: chunk of {key} cannot be read: {error}") from None
    storage = tensor.untyped_storage()
    plain = tensor.is_contiguous() and tensor.storage_offset() == 0
    if not plain or tuple(tensor.shape) != sizes or tensor.dtype != dtype:
        raise UserError(
            f"{path}: chunk of {key} is {list(tensor.shape)} {tensor.dtype}, "
            f"should be a contiguous {list(sizes)} {dtype}"
        )
    return Chunk(tuple(chunk.offsets), sizes, path, place.offset + storage._checkpoint_offset)


@functools.lru_cache(maxsize=1024)
def _archive(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of a contiguous tensor."""
    num_bytes = math.prod(sizes) * dtype.itemsize
    with tempfile.TemporaryFile() as stream:
        with FakeTensorMode():
            tensor = torch.empty(sizes, dtype=dtype)
        with skip_data(materialize_fake_tensors=True):  # leaves a hole where the data would be
            torch.save(tensor, stream)
        end = stream.tell()
        stream.seek(0)
        with FakeTensorMode():
            offset = torch.load(stream, weights_only=True).untyped_storage()._checkpoint_offset
        stream.seek(0)
        head = stream.read(offset)
        stream.seek(offset + num_bytes)
        tail = stream.read(end - offset - num_bytes)
    return head, tail


def _write_archives(chunks: Iterable[Chunk], new_chunks: Iterable[NewChunk]) -> None:
    """The archives' frames around the chunks' bytes."""
    descriptors: dict[Path, int] = {}
    try:
        for chunk, new in zip(chunks, new_chunks, strict=True):
            if chunk.path not in descriptors:
                descriptors[chunk.path] = os.open(chunk.path, os.O_WRONLY)
            head, tail = _archive(new.sizes, new.dtype)
            num_bytes = math.prod(new.sizes) * new.dtype.itemsize
            os.pwrite(descriptors[chunk.path], head, chunk.data_offset - len(head))
            os.pwrite(descriptors[chunk.path], tail, chunk.data_offset + num_bytes)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _tensor_metadata(new_chunks: Iterable[NewChunk]) -> Mapping[str, TensorStorageMetadata]:
    entries: dict[str, TensorStorageMetadata] = {}
    for new in new_chunks:
        if new.key not in entries:
            entries[new.key] = TensorStorageMetadata(TensorProperties(dtype=new.dtype), torch.Size(new.shape), [])
        entries[new.key].chunks.append(ChunkStorageMetadata(torch.Size(new.offsets), torch.Size(new.sizes)))
    return entries
