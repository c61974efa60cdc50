"""The live weights of a Megatron model as Hugging Face tensors, one at a time, without gathering a stage."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_vcppo.hf.mapping import split, unshard
from megatron_vcppo.mcore.hf_weights_io import EMBEDDING, local_parameters
from megatron_vcppo.mcore.model import PackedGPT
from megatron_vcppo.mcore.offload import check_resident, weights


def stream_hf(model: PackedGPT, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of this pipeline stage's parameters; collective over its tensor-parallel ranks.

    All ranks of the tensor-parallel group iterate together; the tensors come out on the first one, the others get
    nothing. A tensor is gathered when it is asked for and not held. Vocabulary padding is trimmed. A tied embedding
    comes from the first stage only. dtype: converted to it; None leaves it.
    """
    check_resident({"weights": weights(model)})
    group = parallel_state.get_tensor_model_parallel_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    root = dist.get_global_rank(group, 0)
    for local, entry in local_parameters(model):
        if entry.name == EMBEDDING and not parallel_state.is_pipeline_first_stage():
            continue
        shard = local.detach().contiguous()
        shards = [shard]
        if entry.split_dim is not None and size > 1:
            shards = [torch.empty_like(shard) for _ in range(size)] if rank == 0 else []
            dist.gather(shard, shards or None, dst=root, group=group)
        if rank == 0:
            for name, tensor in split(entry, unshard(entry, shards)).items():
                yield name, tensor if dtype is None else tensor.to(dtype)
