"""What every stage that trains has: an optimizer, a schedule, checkpoints."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-6
    """Learning rate after the warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled from the gradient, times lr."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass
class ScheduleConfig:
    """Learning rate over optimizer steps."""

    kind: Literal["constant", "cosine"] = "constant"
    """Shape after a linear warm-up."""
    warmup_steps: int = 0
    """First optimizer steps, over which the learning rate rises linearly."""
    min_lr_ratio: float = 0.0
    """The cosine ends at lr × this."""


@dataclass
class CheckpointConfig:
    """When and how the trainer saves."""

    save_every: int = 50
    """Iterations (SFT: optimizer steps) between checkpoints; the last one is always saved."""
    keep_last: int = 2
    """Complete checkpoints kept per stage; 0 keeps all."""
    async_save: bool = False
    """Write in background threads while training continues."""
