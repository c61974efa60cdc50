"""Loads a component's tensors: every rank reads the boxes that it needs by itself.

Megatron's own strategy has the main rank gather and hand back everybody's plan, as pickled objects, although no plan
is changed on the way, and unpickles the folder's metadata.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemReader, load_state_dict
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vcppo.hf.convert.checkpoint_metadata import check_checkpoint


def load_tensors(folder: Path, choose: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Copy what a checkpoint has into ShardedTensors; returns them and what is not sharded.

    choose: what to load, given what the checkpoint stores by key.
    Raises UserError if the folder is damaged, or holds anything but tensors and numbers.
    """
    metadata = check_checkpoint(folder)
    wanted, strategy = choose(metadata.state_dict_metadata), _Strategy(metadata)
    return cast(
        dict[str, Any],
        dist_checkpointing.load(wanted, str(folder), sharded_strategy=strategy, validate_access_integrity=False),
    )


class _Reader(FileSystemReader):
    """With metadata that was read before, as data."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata


class _Strategy(TorchDistLoadShardedStrategy):
    def __init__(self, metadata: Metadata) -> None:
        super().__init__()
        self.metadata = metadata

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        state, flattened, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        translated = mcore_to_pyt_state_dict(state, True)
        load_state_dict(
            translated,
            _Reader(checkpoint_dir, self.metadata),
            no_dist=True,
            planner=MCoreLoadPlanner(
                shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors={
                    tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
                },
            ),
        )
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in translated.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(loaded, flattened, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded
