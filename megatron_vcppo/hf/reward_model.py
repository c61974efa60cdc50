"""What a configuration's neural reward model is made of, and whether its checkpoint is one."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture

T = TypeVar("T")
REWARDED = ("value_pretrain", "ppo")
"""Stages whose rewards a model may give."""


def uses_reward_model(config: Config, stage: str) -> bool:
    """Whether a model rewards the responses of this stage."""
    model = config.rewards.model
    return stage in REWARDED and (model.path is not None or model.stage is not None)


def reward_architecture(config: Config, policy: Architecture) -> Architecture:
    """Of the reward model: its folder's, or the policy's for the one of a stage. Raises UserError with the key."""
    path = config.rewards.model.path
    return policy if path is None else under_path_key(lambda: Architecture.from_hf(path))


def check_reward_model(config: Config) -> None:
    """Raise UserError if rewards.model.path is no reward model that the layout can split; reads headers only."""
    path = config.rewards.model.path

    def check(folder: Path) -> None:
        arch = Architecture.from_hf(folder)
        from megatron_vcppo.hf.safetensors_files import reward_model_tensors  # imports torch

        reward_model_tensors(folder, arch)
        arch.check_parallel(config.parallel.tp, config.parallel.pp)
        if config.rewards.model.input == "tokens":
            arch.check_length(config.model.max_length)

    if path is not None:
        under_path_key(lambda: check(Path(path)))


def under_path_key(run: Callable[[], T]) -> T:
    """What ``run`` returns; its UserError with the key of the folder in front."""
    try:
        return run()
    except UserError as error:
        raise UserError(f"rewards.model.path: {error}") from None
