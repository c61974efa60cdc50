"""Hugging Face tensors into a live Megatron model, and out of it: each rank handles only the layers that it holds."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcppo.hf.adapters import is_adapter
from megatron_vcppo.hf.mapping import Parameter, canonical_name, merge, parameters, shard, split, unshard
from megatron_vcppo.hf.safetensors_files import TensorInFile, model_tensors, reward_model_tensors
from megatron_vcppo.mcore.model import HEAD, CriticModel, PackedGPT
from megatron_vcppo.mcore.offload import check_resident, weights

EMBEDDING = "embedding.word_embeddings.weight"


def load_hf(model: PackedGPT, folder: str | Path) -> None:
    """Copy the weights of a Hugging Face checkpoint into this rank's part of the model.

    A critic takes the trunk and keeps its own head. Raises UserError listing every missing, unexpected or misshaped
    tensor and every damaged file, before any weight is changed.
    """
    _copy(model, model_tensors(Path(folder), model.arch, trunk_only=model.kind == "critic"))


def load_reward_model(model: CriticModel, folder: str | Path) -> None:
    """The same of a checkpoint for sequence classification with one label, with its head."""
    tensors = reward_model_tensors(Path(folder), model.arch)
    _copy(model, tensors)
    if model.post_process:
        with torch.no_grad():
            model.value_head.weight.copy_(tensors["score.weight"].load())
            bias = tensors.get("score.bias")
            model.value_head.bias.zero_() if bias is None else model.value_head.bias.copy_(bias.load())


def _copy(model: PackedGPT, tensors: Mapping[str, TensorInFile]) -> None:
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for local, entry in local_parameters(model):
        full = merge(entry, {name: tensors[name].load() for name in entry.hf_names})
        with torch.no_grad():
            local.copy_(shard(entry, full, tp_rank, tp_size))


def stream_hf(model: PackedGPT) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of this pipeline stage's parameters; collective over its tensor-parallel ranks.

    Adapters are merged into the weights. All ranks of the tensor-parallel group iterate together and get the same
    tensors. A tensor is gathered when the
    iterator reaches it and is not held. Vocabulary padding is trimmed, so shapes are those of ``hf_shapes``; dtypes are
    the model's. A tied embedding comes from the first stage only.
    """
    check_resident({"weights": weights(model)})
    group = parallel_state.get_tensor_model_parallel_group()
    size = dist.get_world_size(group)
    adapted = model.adapters.merged_weights() if model.adapters is not None else {}
    for local, entry in local_parameters(model):
        if entry.name == EMBEDDING and not parallel_state.is_pipeline_first_stage():
            continue
        mine = adapted[id(local)].merged() if id(local) in adapted else local.detach().contiguous()
        shards = [mine]
        if entry.split_dim is not None and size > 1:
            shards = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(shards, mine, group=group)
        yield from split(entry, unshard(entry, shards)).items()


def local_parameters(model: PackedGPT) -> Iterator[tuple[Tensor, Parameter]]:
    """This rank's parameters that exist in the Hugging Face format, each with its row of the mapping table.
    A tensor has the shape of this rank's shard.

    With tied embeddings and several pipeline stages, the last stage's copy of the embedding comes too.
    """
    table = {entry.name: entry for entry in parameters(model.arch, model.config.tensor_model_parallel_size)}
    layers = model.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    for name, tensor in model.named_parameters():
        canonical = canonical_name(name, offset)
        if canonical == "output_layer.weight" and model.arch.tied:
            canonical = EMBEDDING
        if not canonical.startswith(HEAD) and not is_adapter(canonical):
            yield tensor, table[canonical]
