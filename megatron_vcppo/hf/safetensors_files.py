"""Folders of safetensors: where each tensor is stored, reading one, checks of names and sizes, planning of new files.

A safetensors file is an 8-byte little-endian header length, a JSON header ({name: {dtype, shape, data_offsets}}), and
the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.mapping import hf_shapes, parameters
from megatron_vcppo.hf.reward_model import HEAD, check_head
from megatron_vcppo.run.files import open_file, parse_json, read_json

INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS, _MAX_ELEMENTS = 8, 1 << 60
_OUTPUT_LAYER = "lm_head.weight"
_HEADS = {_OUTPUT_LAYER, "score.weight", "score.bias"}


@dataclass(frozen=True)
class TensorInFile:
    """Bytes [offset, offset + num_bytes) of ``path``, row-major."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """The tensor, of ``shape`` and ``dtype``, read into new memory. Raises UserError if it cannot be read."""
        try:
            content = np.fromfile(self.path, np.uint8, self.num_bytes, offset=self.offset)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from None
        if len(content) != self.num_bytes:
            raise UserError(f"{self.path}: truncated: ends before byte {self.offset + self.num_bytes}")
        return torch.from_numpy(content).view(self.dtype).view(self.shape)


def read_folder(folder: str | Path) -> dict[str, TensorInFile]:
    """Every tensor of a Hugging Face folder. Raises UserError that lists missing, damaged and truncated files."""
    folder = Path(folder)
    weight_map = _weight_map(folder)
    tensors: dict[str, TensorInFile] = {}
    problems: list[str] = []
    for name in dict.fromkeys(weight_map.values()) if weight_map else _files_without_index(folder):
        try:
            in_file = _read_header(folder / name)
        except UserError as error:
            problems.append(str(error))
            continue
        twice = in_file.keys() & tensors.keys()
        problems += [f"{folder / name}: tensor {key} is also in {tensors[key].path.name}" for key in twice]
        tensors.update(in_file)
    for tensor, name in weight_map.items():
        if not problems and (tensor not in tensors or tensors[tensor].path.name != name):
            problems.append(f"{folder / INDEX_NAME}: tensor {tensor} is not in {name}")
    if problems:
        raise UserError(f"{folder}: unusable weights:\n" + "\n".join(f"  {text}" for text in problems))
    return tensors


def check_shapes(
    folder: str | Path,
    tensors: Mapping[str, TensorInFile],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
) -> None:
    """Raises UserError that lists every missing, unexpected and misshaped tensor of a folder, if there is one."""
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected and name not in set(ignored)]
    problems += [
        f"misshaped: {name} is {list(tensors[name].shape)}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise UserError(f"{folder}: weights do not match config.json:\n" + "\n".join(f"  {text}" for text in problems))


def plan_files(
    folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_file_bytes: int
) -> dict[str, TensorInFile]:
    """Write the headers (and, for several files, the index) of new files; return where each tensor's bytes go.

    Tensors keep their order; a file is closed before it would exceed ``max_file_bytes`` (a larger tensor gets its
    own). The files have their final size; the tensors' bytes are for the caller to fill in.
    """
    groups: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    size = total = 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + num_bytes > max_file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (shape, dtype)
        size += num_bytes
        total += num_bytes
    placed: dict[str, TensorInFile] = {}
    for number, group in enumerate(groups, start=1):
        several = len(groups) > 1
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if several else "model.safetensors"
        placed.update(_write_header(folder / file_name, group))
    if len(groups) > 1:
        weight_map = {name: tensor.path.name for name, tensor in placed.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return placed


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    try:
        weight_map = read_json(path)["weight_map"]
        if not isinstance(weight_map, dict) or not all(_is_plain_name(name) for name in weight_map.values()):
            raise ValueError("weight_map must name files of this folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error!r}") from None
    return weight_map


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name


def _files_without_index(folder: Path) -> list[str]:
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"{folder}: no *.safetensors files; other weight formats are not read")
    return names


def _read_header(path: Path) -> dict[str, TensorInFile]:
    try:
        size = path.stat().st_size
        with open_file(path) as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
                raise UserError(f"{path}: truncated, or not a safetensors file")
            header = parse_json(stream.read(length), _without_duplicates)
        header.pop("__metadata__", None)
        entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        for name, _, shape, begin, finish in entries:
            numbers = all(type(number) is int and number >= 0 for number in (*shape, begin, finish))
            if not numbers or len(shape) > _MAX_DIMENSIONS or math.prod(max(1, size) for size in shape) > _MAX_ELEMENTS:
                raise ValueError(f"the shape or place of tensor {name}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged header: {error!r:.200}") from None
    tensors: dict[str, TensorInFile] = {}
    end = 0
    for name, dtype, shape, begin, finish in sorted(entries, key=lambda entry: entry[3:]):
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UserError(f"{path}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        if begin != end:
            raise UserError(f"{path}: damaged header: tensor {name} begins at byte {begin}, not at {end}")
        tensor = TensorInFile(path, 8 + length + begin, shape, DTYPES[dtype])
        if finish - begin != tensor.num_bytes:
            raise UserError(f"{path}: damaged header: tensor {name} has {finish - begin} bytes, not {tensor.num_bytes}")
        tensors[name] = tensor
        end = finish
    if size != 8 + length + end:
        raise UserError(f"{path}: truncated or damaged: {size} bytes, should be {8 + length + end}")
    return {name: tensors[name] for name, *_ in entries}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _write_header(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, TensorInFile]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes start aligned
    with open(path, "xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    begin = 8 + len(text)
    placed = {}
    for name, (shape, dtype) in tensors.items():
        placed[name] = TensorInFile(path, begin, shape, dtype)
        begin += placed[name].num_bytes
    return placed


def model_tensors(folder: Path, arch: Architecture, trunk_only: bool = False) -> dict[str, TensorInFile]:
    """Where each tensor of the model is stored, in the order of the mapping table.

    trunk_only: without the output layer, for a critic, which has its own head; the folder's head is ignored. Raises
    UserError that lists every missing, unexpected, misshaped, damaged or truncated tensor or file.
    """
    tensors = read_folder(folder)
    expected = hf_shapes(parameters(arch))
    ignored = {name for name in tensors if name.endswith(".rotary_emb.inv_freq")}  # buffers of old versions
    has_copy = arch.tied and _OUTPUT_LAYER in tensors
    if trunk_only:
        expected.pop(_OUTPUT_LAYER, None)
        ignored |= _HEADS
    elif has_copy:
        ignored.add(_OUTPUT_LAYER)
    check_shapes(folder, tensors, expected, ignored)
    if has_copy and not trunk_only:
        _check_copy(folder, tensors["model.embed_tokens.weight"], tensors[_OUTPUT_LAYER])
    return {name: tensors[name] for name in expected}


def reward_model_tensors(folder: Path, arch: Architecture) -> dict[str, TensorInFile]:
    """The same of a checkpoint for sequence classification with one label: trunk, ``score.weight``, ``score.bias`` if
    there is one. Raises UserError also for a head that is missing or has several labels."""
    tensors = read_folder(folder)
    expected = hf_shapes(parameters(arch, kind="critic"))
    check_head(folder, tensors[HEAD].shape if HEAD in tensors else None)
    if "score.bias" not in tensors:
        del expected["score.bias"]
    ignored = {name for name in tensors if name.endswith(".rotary_emb.inv_freq")} | {_OUTPUT_LAYER}
    check_shapes(folder, tensors, expected, ignored)
    return {name: tensors[name] for name in expected}


def _check_copy(folder: Path, embedding: TensorInFile, output_layer: TensorInFile) -> None:
    """A tied model's output layer may be stored next to the embedding, as long as it is the same."""
    if not np.array_equal(_bytes(embedding), _bytes(output_layer)):
        raise UserError(
            f"{folder}: config.json ties the output layer to the embedding, but {_OUTPUT_LAYER} differs from it; "
            "set tie_word_embeddings to false or remove the tensor"
        )


def _bytes(tensor: TensorInFile) -> np.ndarray:
    return np.memmap(tensor.path, np.uint8, "r", tensor.offset, tensor.num_bytes)
