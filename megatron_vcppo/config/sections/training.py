"""Parts of the section of every stage that trains: ``optimizer``, ``schedule``, ``checkpoint``."""

from dataclasses import dataclass, field
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
class KeepBestConfig:
    """The best checkpoints by a metric, in RUN/STAGE/kept as hard links next to those of `keep_last`."""

    metric: str | None = None
    """Name in metrics.jsonl, measured after the update, such as evaluation/avg (PPO, with ppo.evaluate_every) or
    sft/validation_loss (with mode: min). A step that is among the best so far is saved at once. Default: none."""
    count: PositiveInt = 2
    """How many to keep."""
    mode: Literal["max", "min"] = "max"
    """Whether the highest or the lowest value is best."""


@dataclass
class CheckpointConfig:
    """When and how the trainer saves."""

    save_every: PositiveInt = 50
    """Interval between checkpoints in iterations (PPO) or optimizer steps (other stages); the last one is always
    saved."""
    save_every_s: PositiveFloat | None = None
    """Also save once this many seconds have passed since the last save, at the end of a step. Default: never."""
    keep_last: NonNegativeInt = 2
    """Number of complete checkpoints to keep per stage; 0: all."""
    keep_every: NonNegativeInt = 0
    """Also save every N-th step (PPO: iteration) and keep it, in RUN/STAGE/kept; 0: none."""
    keep_best: KeepBestConfig = field(default_factory=KeepBestConfig)
    async_save: bool = False
    """Write checkpoints in background threads while training continues."""
