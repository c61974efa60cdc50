"""Parts of the section of every stage that trains: ``optimizer``, ``schedule``, ``checkpoint``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_vcppo.config.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: NonNegativeFloat = 1e-6
    """Learning rate after the warm-up."""
    beta1: Annotated[float, Range("[0, 1)")] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Range("[0, 1)")] = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; multiplied by lr."""
    clip_grad: NonNegativeFloat = 1.0
    """Maximum global gradient norm; 0: no clipping."""


@dataclass
class ScheduleConfig:
    """Learning rate over optimizer steps."""

    kind: Literal["constant", "cosine"] = "constant"
    """Shape after a linear warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Number of initial optimizer steps over which the learning rate rises linearly."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate of the cosine, as a fraction of lr."""


@dataclass
class CheckpointConfig:
    """When and how the trainer saves."""

    save_every: PositiveInt = 50
    """Interval between checkpoints in iterations (PPO) or optimizer steps (other stages); the last one is always
    saved."""
    keep_last: NonNegativeInt = 2
    """Number of complete checkpoints to keep per stage; 0: all."""
    async_save: bool = False
    """Write checkpoints in background threads while training continues."""
