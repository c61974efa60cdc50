"""A Hugging Face folder straight into a live Megatron model: each rank reads only the rows and layers it holds."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore.hf_mapping import Parameter, canonical_name, merge, parameters, shard
from megatron_vcppo.mcore.model import PackedGPT

EMBEDDING = "embedding.word_embeddings.weight"


def load_hf(model: PackedGPT, folder: str | Path) -> None:
    """Copy the weights of a Hugging Face checkpoint into this rank's part of the model.

    A critic takes the trunk and keeps its own head. Raises UserError naming missing or misshaped tensors.
    """
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    with HfTensors(Path(folder)) as tensors:
        for local, entry in local_parameters(model):
            full = merge(entry, {name: tensors[name] for name in entry.hf_names})
            if tuple(full.shape) != entry.shape:
                raise UserError(
                    f"{folder}: {' + '.join(entry.hf_names)} make up {tuple(full.shape)}, "
                    f"the architecture in config.json says {entry.shape}"
                )
            with torch.no_grad():
                local.copy_(shard(entry, full, tp_rank, tp_size))


def local_parameters(model: PackedGPT) -> Iterator[tuple[Tensor, Parameter]]:
    """This rank's parameters that exist in the Hugging Face format, each with its row of the mapping table.

    With tied embeddings and several pipeline stages, the last stage's copy of the embedding comes too.
    """
    table = {entry.name: entry for entry in parameters(model.arch, model.config.tensor_model_parallel_size)}
    layers = model.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    for name, tensor in model.named_parameters():
        canonical = canonical_name(name, offset)
        if canonical == "output_layer.weight" and model.arch.tied:
            canonical = EMBEDDING
        if not canonical.startswith("value_head."):
            yield tensor, table[canonical]


class HfTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, read when asked for. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.files = self._locate()

    def _locate(self) -> dict[str, Path]:
        """Tensor name -> file, from the index if there is one."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{index}: damaged: {error}") from None
            return {name: self.folder / file for name, file in weight_map.items()}
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise UserError(f"{self.folder}: neither model.safetensors nor model.safetensors.index.json is there")
        return dict.fromkeys(self._open(single).keys(), single)

    def __enter__(self) -> "HfTensors":
        self.opened: dict[Path, Any] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.folder}: no tensor {name!r} in the checkpoint; its config.json asks for one")
        path = self.files[name]
        if path not in self.opened:
            self.opened[path] = self.stack.enter_context(self._open(path))
        return self.opened[path].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
