"""Checkpoints without a stage around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vcppo.config import CheckpointConfig, Config
from megatron_vcppo.hf.convert.checkpoint_metadata import check_checkpoint
from megatron_vcppo.mcore import object_collectives
from megatron_vcppo.mcore.checkpoint import CheckpointFolder

TORCHS_OWN = {
    name: call for name, call in vars(dist.distributed_c10d).items() if name.endswith(("_object", "_object_list"))
}
"""Its collectives for objects, as they are before a rank starts."""


def checkpoint_folder(
    folder: Path, hf: Path, keep_last: int = 2, async_save: bool = False, seed: int = 0
) -> CheckpointFolder:
    """Of a configuration that names the model and the seed; collective."""
    config = Config()
    config.model.hf, config.run.seed = str(hf), seed
    return CheckpointFolder(folder, config, CheckpointConfig(keep_last=keep_last, async_save=async_save))


def stored_tensors(component: Path) -> dict[str, Tensor]:
    """Every global tensor of a component, put together from its boxes by torch itself; without ranks."""
    stored = check_checkpoint(component).state_dict_metadata.items()
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(component), no_dist=True)
    return tensors


@contextmanager
def torchs_own() -> Iterator[None]:
    """Within the block a rank has these again: Megatron's own code writes and reads checkpoints with them."""
    for module in (dist, dist.distributed_c10d):
        for name, call in TORCHS_OWN.items():
            setattr(module, name, call)
    try:
        yield
    finally:
        object_collectives.install()
