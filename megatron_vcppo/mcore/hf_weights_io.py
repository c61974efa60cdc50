"""A Hugging Face folder straight into a live Megatron model: each rank reads only the layers that it holds."""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcppo.hf.hf_weights import model_tensors
from megatron_vcppo.hf.mapping import Parameter, canonical_name, merge, parameters, shard
from megatron_vcppo.mcore.model import PackedGPT

EMBEDDING = "embedding.word_embeddings.weight"


def load_hf(model: PackedGPT, folder: str | Path) -> None:
    """Copy the weights of a Hugging Face checkpoint into this rank's part of the model.

    A critic takes the trunk and keeps its own head. Raises UserError listing every missing, unexpected or misshaped
    tensor and every damaged file, before any weight is changed.
    """
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tensors = model_tensors(Path(folder), model.arch, trunk_only=model.kind == "critic")
    for local, entry in local_parameters(model):
        full = merge(entry, {name: tensors[name].load() for name in entry.hf_names})
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
