"""Checkpoints without a stage around them."""

from pathlib import Path

from megatron_vcppo.config import CheckpointConfig, Config
from megatron_vcppo.mcore.checkpoint import CheckpointFolder


def checkpoint_folder(
    folder: Path, hf: Path, keep_last: int = 2, async_save: bool = False, seed: int = 0
) -> CheckpointFolder:
    """Of a configuration that names the model and the seed; collective."""
    config = Config()
    config.model.hf, config.run.seed = str(hf), seed
    return CheckpointFolder(folder, config, CheckpointConfig(keep_last=keep_last, async_save=async_save))
