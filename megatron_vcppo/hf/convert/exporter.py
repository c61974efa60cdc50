"""A Megatron checkpoint of any layout to a Hugging Face folder. One process; needs only the checkpoint folder.

An export must pass checks of its names, shapes, dtypes and sizes, and of the logits of a short prompt."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch

from megatron_vcppo.data.vocabulary import complete_generation_config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapter_base import locate
from megatron_vcppo.hf.adapters import StoredAdapters
from megatron_vcppo.hf.architecture import CRITIC_CLASSES, Architecture
from megatron_vcppo.hf.convert import conversion_plan
from megatron_vcppo.hf.convert.adapter_weights import AdapterWeights, adapter_keys, read_adapters
from megatron_vcppo.hf.convert.checkpoint_metadata import check_checkpoint
from megatron_vcppo.hf.convert.copying import Job, Matrix, Progress, Strip, gather
from megatron_vcppo.hf.convert.dist_format import Chunk, GlobalTensor, check_keys, read_model
from megatron_vcppo.hf.convert.folders import copy_small_files, new_folder
from megatron_vcppo.hf.mapping import Parameter, checkpoint_place, hf_shapes, parameters
from megatron_vcppo.hf.safetensors_files import (
    INDEX_NAME,
    TensorInFile,
    check_shapes,
    model_tensors,
    plan_files,
    read_folder,
)
from megatron_vcppo.run.files import read_json
from megatron_vcppo.run.manifest import MANIFEST_NAME, path_inside, read_manifest, verify_manifest

TOLERANCE = 1e-4
"""Largest difference of logits in float32, relative to the largest logit (at least 1)."""
TIMEOUT_S = 3600.0
_BASE_BYTES = 2 << 30
MAX_FILE_BYTES = 2_000_000_000


def check_export(folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raises UserError if the files on disk do not hold exactly these tensors: name -> (shape, dtype)."""
    found = read_folder(folder)
    check_shapes(folder, found, {name: shape for name, (shape, _) in tensors.items()})
    wrong = [
        f"  {name}: {found[name].dtype}, should be {dtype}"
        for name, (_, dtype) in tensors.items()
        if found[name].dtype != dtype
    ]
    if wrong:
        raise UserError(f"{folder}: wrong dtypes:\n" + "\n".join(wrong))
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    index = folder / INDEX_NAME
    if index.exists():
        recorded = read_json(index)["metadata"]["total_size"]
        if recorded != total:
            raise UserError(f"{index}: total_size is {recorded}, should be {total}")


def compare_logits(
    checkpoint: Path, exported: Path, arch: Architecture, dtype: torch.dtype | None = None, hf: Path | None = None
) -> str:
    """Run one prompt through Megatron (TP 1, PP 1) and transformers on the CPU in float32; returns how far they differ.

    A separate process does it and holds one model at a time: 4 bytes per parameter. If the memory does not suffice,
    the comparison is skipped and the returned line reports that. ``dtype`` is what the export rounded the weights to,
    if it did; ``hf`` as in ``export_hf``. Raises UserError if the logits differ.
    """
    needed = int(4.5 * arch.parameter_count()) + _BASE_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        return (
            f"logits not compared: that takes about {needed / 2**30:.0f} GiB of memory, "
            f"{available / 2**30:.0f} GiB are available"
        )
    command = [sys.executable, "-m", "megatron_vcppo.mcore.export_logits", str(checkpoint), str(exported)]
    command += [str(dtype).removeprefix("torch.") if dtype is not None else "", str(hf or "")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{exported}: comparing logits took longer than {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"comparing logits failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    difference, largest = result["difference"], result["largest"]
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{exported}: logits differ from Megatron's by {difference:.3g} (largest logit {largest:.3g}); not exported"
        )
    return f"logits of {result['tokens']} tokens agree with Megatron's within {difference:.1e}"


def export_hf(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    verify_logits: bool = True,
    progress: Progress | None = None,
    hf: Path | None = None,
) -> str:
    """Write the model in ``checkpoint`` (an import, a component of an iteration, or what ``actor_folder`` takes).

    A critic becomes a token-classification model whose one logit per token is the value of the prefix. Adapters are
    merged into the weights below them.

    dtype: converts every tensor; None keeps the checkpoint's. hf: where the weights below adapters may be now. Returns
    one line about what was checked. Raises UserError if the checkpoint is damaged or unsuitable, a check fails, or
    ``out`` is in use; ``out`` is then not made.
    """
    checkpoint = actor_folder(Path(checkpoint))
    meta = verify_manifest(checkpoint)
    check_checkpoint(checkpoint)
    arch = _architecture(checkpoint, meta)
    sources, adapters = _sources(checkpoint, meta, arch, hf)
    own = {name: kind for source in sources for name, kind in source.dtypes().items()}
    shapes = hf_shapes(parameters(arch, 1, meta["kind"]))
    tensors = {name: (shape, dtype or own[name]) for name, shape in shapes.items()}
    total_bytes = sum(int(np.prod(shape)) * kind.itemsize for shape, kind in tensors.values())
    with new_folder(Path(out), needed_bytes=total_bytes) as folder:
        copy_small_files(checkpoint / "hf", folder)
        complete_generation_config(folder)
        _describe(folder / "config.json", arch, tensors["model.norm.weight"][1], meta["kind"])
        placed = plan_files(folder, tensors, MAX_FILE_BYTES)
        wide = {name: Matrix(place.path, place.offset, place.row_bytes) for name, place in placed.items()}
        for source in sources:
            for kind, jobs in source.copies(wide):
                convert = None if dtype in (None, kind) else _converter(kind, dtype)
                gather(jobs, total_bytes, progress, convert)
        if adapters is not None:
            adapters.merge_into(placed)
            dtype = tensors["model.norm.weight"][1]
        check_export(folder, tensors)
        if not verify_logits:
            return "logits not compared, as requested"
        return compare_logits(checkpoint, folder, arch, dtype, hf)


def actor_folder(checkpoint: Path) -> Path:
    """The component that an export reads: ``checkpoint`` itself, the ``actor`` of an iteration, or of a done stage."""
    if not (checkpoint / MANIFEST_NAME).exists():
        return checkpoint
    last = read_manifest(checkpoint)["meta"].get("checkpoint")
    iteration = path_inside(checkpoint, last) if last else checkpoint
    inner = iteration / "actor"
    return inner if (inner / MANIFEST_NAME).exists() else iteration


def _architecture(checkpoint: Path, meta: Mapping[str, Any]) -> Architecture:
    kind = meta.get("kind")
    if kind is None:
        inside = ", ".join(sorted(path.parent.name for path in checkpoint.glob(f"*/{MANIFEST_NAME}"))) or "nothing"
        raise UserError(f"{checkpoint}: holds no actor; it has {inside}: name the folder of what is to be exported")
    if kind not in ("actor", "critic"):
        raise UserError(f"{checkpoint}: holds {kind!r}; only an actor or a critic has a Hugging Face form")
    arch = Architecture.of_manifest(checkpoint, meta)
    arch.check_exportable(kind)
    if Architecture.from_hf(checkpoint / "hf") != arch:
        raise UserError(f"{checkpoint}/hf/config.json: describes another model than the checkpoint's manifest")
    return arch


def _keys(arch: Architecture, table: list[Parameter]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a table's parameters in a checkpoint."""
    expected = {}
    for parameter in table:
        place = checkpoint_place(parameter.name, arch)
        expected[place.key] = (*place.stack, *parameter.shape)
    return expected


class _Source(Protocol):
    """Where weights of an export come from."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """By Hugging Face name."""

    def copies(self, wide: Mapping[str, Matrix]) -> Iterator[tuple[torch.dtype, Iterator[Job]]]:
        """What to copy, by the dtype that it has here."""


@dataclass(frozen=True)
class _Stored(_Source):
    """Parameters of a Megatron checkpoint."""

    arch: Architecture
    table: list[Parameter]
    stored: Mapping[str, GlobalTensor]

    def dtypes(self) -> dict[str, torch.dtype]:
        kinds = ((p, self.stored[checkpoint_place(p.name, self.arch).key].dtype) for p in self.table)
        return {name: kind for parameter, kind in kinds for name in parameter.hf_names}

    def copies(self, wide: Mapping[str, Matrix]) -> Iterator[tuple[torch.dtype, Iterator[Job]]]:
        for kind, some in _by_dtype(self.table, self.arch, self.stored).items():
            yield kind, _jobs(some, self.arch, self.stored, wide)


@dataclass(frozen=True)
class _Files(_Source):
    """Tensors of a Hugging Face folder."""

    tensors: Mapping[str, TensorInFile]

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def copies(self, wide: Mapping[str, Matrix]) -> Iterator[tuple[torch.dtype, Iterator[Job]]]:
        for kind in dict.fromkeys(self.dtypes().values()):
            some = {name: tensor for name, tensor in self.tensors.items() if tensor.dtype == kind}
            yield kind, (_whole(wide[name], tensor) for name, tensor in some.items())


def _whole(wide: Matrix, tensor: TensorInFile) -> Job:
    return Job(wide, 0, tensor.shape[0], (Strip(Matrix(tensor.path, tensor.offset, tensor.row_bytes), 0, 0),))


def _sources(
    checkpoint: Path, meta: Mapping[str, Any], arch: Architecture, hf: Path | None
) -> tuple[list[_Source], AdapterWeights | None]:
    """Where the weights are, and the adapters that are to be merged into them. Raises UserError as ``export_hf``."""
    kind, own = meta["kind"], read_model(checkpoint)
    adapters = StoredAdapters.of_manifest(checkpoint, meta)
    if adapters is None:
        table = parameters(arch, _tp_of(checkpoint, meta, arch), kind)
        check_keys(checkpoint, _keys(arch, table), own)
        return [_Stored(arch, table, own)], None
    head = [parameter for parameter in parameters(arch, 1, kind) if parameter.name.startswith("value_head.")]
    check_keys(checkpoint, _keys(arch, head) | adapter_keys(arch, adapters), own)
    merged = read_adapters(arch, adapters, own)
    folder = locate(adapters.base, checkpoint, hf)
    if adapters.base.kind == "hf":
        return [_Files(model_tensors(folder, arch, trunk_only=kind == "critic")), _Stored(arch, head, own)], merged
    base_meta, base = verify_manifest(folder), read_model(folder)
    check_checkpoint(folder)
    table = parameters(arch, _tp_of(folder, base_meta, arch), base_meta["kind"])
    check_keys(folder, _keys(arch, table), base)
    wanted = {parameter.name for parameter in parameters(arch, 1, kind)} - {parameter.name for parameter in head}
    return [_Stored(arch, [p for p in table if p.name in wanted], base), _Stored(arch, head, own)], merged


def _tp_of(checkpoint: Path, meta: Mapping[str, Any], arch: Architecture) -> int:
    tp = meta.get("tp")
    if not isinstance(tp, int) or tp < 1:
        raise UserError(f"{checkpoint}/{MANIFEST_NAME}: damaged: tp {tp!r} is no number of ranks")
    arch.check_parallel(tp, 1)
    return tp


def _by_dtype(
    table: list[Parameter], arch: Architecture, stored: Mapping[str, GlobalTensor]
) -> dict[torch.dtype, list[Parameter]]:
    groups: dict[torch.dtype, list[Parameter]] = {}
    for parameter in table:
        groups.setdefault(stored[checkpoint_place(parameter.name, arch).key].dtype, []).append(parameter)
    return groups


def _jobs(
    table: list[Parameter], arch: Architecture, stored: Mapping[str, GlobalTensor], wide: Mapping[str, Matrix]
) -> Iterator[Job]:
    chunks: dict[tuple[str, tuple[int, ...]], list[Chunk]] = {}
    stacks = {place.key: len(place.stack) for place in (checkpoint_place(one.name, arch) for one in table)}
    for key, depth in stacks.items():
        for chunk in stored[key].chunks:
            assert all(size == 1 for size in chunk.sizes[:depth]), f"{chunk.path}: a chunk over {chunk.sizes[:depth]}"
            chunks.setdefault((key, tuple(chunk.offsets[:depth])), []).append(chunk)
    for parameter in table:
        place = checkpoint_place(parameter.name, arch)
        mine = chunks[place.key, place.index]
        yield from conversion_plan.jobs(parameter, mine, stored[place.key].dtype.itemsize, wide)


def _converter(source: torch.dtype, target: torch.dtype) -> Any:
    def convert(rows: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(rows).view(source)
        converted = values.to(target)
        if target == torch.float16 and not torch.equal(values.isfinite(), converted.isfinite()):
            raise UserError("a weight is too large for float16; export as bfloat16 or float32")
        return converted.view(torch.uint8).numpy()

    return convert


def _describe(config_file: Path, arch: Architecture, dtype: torch.dtype, kind: str) -> None:
    """config.json names the weights' dtype, in which transformers loads them, and the class of a critic."""
    name = str(dtype).removeprefix("torch.")
    config = dict(arch.config)
    if arch.dtype != name:
        config["dtype" if "dtype" in config else "torch_dtype"] = name
    if kind == "critic":
        config["architectures"] = [CRITIC_CLASSES[arch.family]]
        config["id2label"], config["label2id"] = {"0": "value"}, {"value": 0}
        config["classifier_dropout"] = 0.0
    if config != dict(arch.config):
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
