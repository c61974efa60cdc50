"""Adapters of a checkpoint merged into exported weights, or as a folder that PEFT reads. No Megatron, no PEFT."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapter_base import locate
from megatron_vcppo.hf.adapters import MATRICES, StoredAdapters, adapter_shapes, checkpoint_key
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.convert.checkpoint_metadata import check_checkpoint
from megatron_vcppo.hf.convert.dist_format import GlobalTensor, check_keys, read_model
from megatron_vcppo.hf.convert.folders import new_folder
from megatron_vcppo.hf.safetensors_files import TensorInFile, check_shapes, read_folder
from megatron_vcppo.run.access import as_made_here
from megatron_vcppo.run.manifest import verify_manifest


@dataclass(frozen=True)
class AdapterWeights:
    """All adapters of one component, in memory: a small part of the model."""

    stored: StoredAdapters
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    """Hugging Face layer, such as model.layers.0.self_attn.q_proj → A [rank, in], B [out, rank]."""

    def merge_into(self, placed: Mapping[str, TensorInFile]) -> None:
        """Add every adapter to the weight of its layer, in the files; summed in float32."""
        assert self.stored.lora.rank is not None
        scale = self.stored.lora.alpha / self.stored.lora.rank
        for module, (a, b) in self.matrices.items():
            place = placed[f"{module}.weight"]
            merged = (place.load().float() + b.float() @ a.float() * scale).to(place.dtype)
            if not merged.isfinite().all():
                raise UserError(f"{module}.weight is too large for {place.dtype}; export as bfloat16 or float32")
            with open(place.path, "r+b") as stream:
                stream.seek(place.offset)
                stream.write(merged.contiguous().view(torch.uint8).numpy().data)

    def peft_tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """By the names that PEFT gives them."""
        return {
            f"base_model.model.{module}.{matrix}.weight": (tensor if dtype is None else tensor.to(dtype)).contiguous()
            for module, pair in self.matrices.items()
            for matrix, tensor in zip(MATRICES, pair, strict=True)
        }


def adapter_keys(arch: Architecture, stored: StoredAdapters) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the adapters in a checkpoint."""
    rank = stored.lora.rank or 0
    found: dict[str, tuple[int, ...]] = {}
    for name in stored.lora.targets:
        shape = adapter_shapes(arch)[name]
        sizes = ((rank, shape.in_size), (shape.out_size, rank))
        found |= {
            checkpoint_key(name, matrix): (arch.num_layers, *size) for matrix, size in zip(MATRICES, sizes, strict=True)
        }
    return found


def read_adapters(arch: Architecture, stored: StoredAdapters, tensors: Mapping[str, GlobalTensor]) -> AdapterWeights:
    """tensors: of the checkpoint, whose keys and shapes have been checked."""
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for name in stored.lora.targets:
        a, b = (read_tensor(tensors[checkpoint_key(name, matrix)]) for matrix in MATRICES)
        module = adapter_shapes(arch)[name].hf_module
        matrices |= {f"model.layers.{layer}.{module}": (a[layer], b[layer]) for layer in range(arch.num_layers)}
    return AdapterWeights(stored, matrices)


def read_tensor(tensor: GlobalTensor) -> Tensor:
    """A whole tensor of a checkpoint. Raises UserError if a file is shorter than it says."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for chunk in tensor.chunks:
        place = TensorInFile(chunk.path, chunk.data_offset, chunk.sizes, tensor.dtype)
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = place.load()
    return whole


def export_peft(checkpoint: Path, out: Path, hf: Path | None, dtype: torch.dtype | None = None) -> str:
    """Write an actor's adapters as PEFT's adapter_config.json and adapter_model.safetensors; returns a line about them.

    hf: where the base may be now, if it is a Hugging Face folder; PEFT is told where it is. dtype: converts them.
    Raises UserError if the checkpoint is damaged, is no actor or has no adapters, or ``out`` is in use.
    """
    meta = verify_manifest(checkpoint)
    check_checkpoint(checkpoint)
    stored = StoredAdapters.of_manifest(checkpoint, meta)
    if stored is None or meta.get("kind") != "actor":
        raise UserError(f"{checkpoint}: has no adapters of an actor: train with model.lora.rank, or leave out PEFT")
    arch = Architecture.of_manifest(checkpoint, meta)
    base = locate(stored.base, checkpoint, hf)
    tensors = read_model(checkpoint)
    check_keys(checkpoint, adapter_keys(arch, stored), tensors)
    weights = read_adapters(arch, stored, tensors).peft_tensors(dtype)
    alpha = stored.lora.alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if stored.base.kind == "hf" else None,
        "r": stored.lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": [*stored.lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(out, needed_bytes=sum(tensor.nbytes for tensor in weights.values())) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        as_made_here(folder / "adapter_model.safetensors")
        check_shapes(folder, read_folder(folder), {name: tuple(tensor.shape) for name, tensor in weights.items()})
    if stored.base.kind == "hf":
        return f"{len(weights) // 2} adapters for the model in {base}"
    return f"{len(weights) // 2} adapters for the weights of {base}, which vcppo convert export gives to transformers"
