"""Weights of files into a live Megatron model, and out of it: each rank handles only the layers that it holds."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcppo.hf.adapters import is_adapter
from megatron_vcppo.hf.convert.folders import is_megatron_lm
from megatron_vcppo.hf.convert.megatron_lm import MegatronLmWeights
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


def load_base(model: PackedGPT, folder: str | Path) -> None:
    """The same of a Hugging Face folder or of a checkpoint of Megatron-LM, whichever the folder is."""
    if not is_megatron_lm(Path(folder)):
        load_hf(model, folder)
        return
    tp_size, tp_rank = _tensor_parallel()
    table = parameters(model.arch, tp_size, model.kind)
    weights = MegatronLmWeights(Path(folder), table, model.arch, model.kind)
    for local, entry in local_parameters(model):
        with torch.no_grad():
            local.copy_(shard(entry, weights.load(entry), tp_rank, tp_size))


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
    tp_size, tp_rank = _tensor_parallel()
    for local, entry in local_parameters(model):
        full = merge(entry, {name: tensors[name].load() for name in entry.hf_names})
        with torch.no_grad():
            local.copy_(shard(entry, full, tp_rank, tp_size))


def _tensor_parallel() -> tuple[int, int]:
    """(size, rank)"""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return size, parallel_state.get_tensor_model_parallel_rank()


def stream_hf(model: PackedGPT) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of this pipeline stage's parameters; collective over its tensor-parallel ranks and,
    of a mixture, its expert-parallel ranks.

    All ranks of these groups iterate together and get the same tensors. A tensor is gathered when the iterator reaches
    it and is not held; of experts, one per expert-parallel rank is. Vocabulary padding is trimmed, so shapes are those
    of ``hf_shapes``; dtypes are the model's. A tied embedding comes from the first stage only. Adapters are merged into
    the weights.
    """
    check_resident({"weights": weights(model)})
    tp_group = parallel_state.get_tensor_model_parallel_group()
    table = _table(model)
    adapted = model.adapters.merged_weights() if model.adapters is not None else {}
    for local, entry in local_parameters(model):
        if entry.name == EMBEDDING and not parallel_state.is_pipeline_first_stage():
            continue
        mine = adapted[id(local)].merged() if id(local) in adapted else local.detach().contiguous()
        if entry.expert is not None:
            yield from _experts_of_all_ranks(mine, entry, table, model.config.num_moe_experts)
            continue
        shards = [mine] if entry.split_dim is None else _gather(mine, tp_group)
        yield from split(entry, unshard(entry, shards)).items()


def _experts_of_all_ranks(
    mine: Tensor, entry: Parameter, table: Mapping[str, Parameter], num_experts: int
) -> Iterator[tuple[str, Tensor]]:
    """The expert that each expert-parallel rank has in the place of this rank's; collective over them."""
    assert entry.expert is not None
    everyone = _gather(mine, parallel_state.get_expert_model_parallel_group())
    num_local = num_experts // len(everyone)
    for rank, whole in enumerate(everyone):
        expert = rank * num_local + entry.expert % num_local
        other = table[entry.name.replace(f".experts.{entry.expert}.", f".experts.{expert}.")]
        yield from split(other, whole).items()


def local_parameters(model: PackedGPT) -> Iterator[tuple[Tensor, Parameter]]:
    """This rank's parameters that exist in the Hugging Face format, each with its row of the mapping table.
    A tensor has the shape of this rank's shard.

    With tied embeddings and several pipeline stages, the last stage's copy of the embedding comes too.
    """
    table = _table(model)
    layers = model.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    experts = model.arch.experts
    first_expert = 0
    if experts is not None:
        ep_size = parallel_state.get_expert_model_parallel_world_size()
        first_expert = parallel_state.get_expert_model_parallel_rank() * (experts.count // ep_size)
    for name, tensor in model.named_parameters():
        canonical = canonical_name(name, offset, first_expert, model.arch.sparse_layers)
        if canonical == "output_layer.weight" and model.arch.tied:
            canonical = EMBEDDING
        if not canonical.startswith(HEAD) and not is_adapter(canonical):
            yield tensor, table[canonical]


def _table(model: PackedGPT) -> dict[str, Parameter]:
    return {entry.name: entry for entry in parameters(model.arch, model.config.tensor_model_parallel_size)}


def _gather(mine: Tensor, group: Any) -> list[Tensor]:
    """Tensors of one shape from all ranks of a group, in order."""
    size = dist.get_world_size(group)
    if size == 1:
        return [mine]
    everyone = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(everyone, mine, group=group)
    return everyone
