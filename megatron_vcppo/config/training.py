"""What every stage that trains has: an optimizer, a schedule, checkpoints."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass
class ScheduleConfig:
    """Learning rate over optimizer steps."""

    kind: Literal["constant", "cosine"] = "constant"
    """Shape after a linear warm-up."""
    warmup_steps: int = 0
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
