"""Section ``reward_model``."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vcppo.config.ranges import Fraction, PositiveInt
from megatron_vcppo.config.sections.training import CheckpointConfig, OptimizerConfig, ScheduleConfig


@dataclass
class RewardModelConfig:
    """A scalar head on the SFT model that scores whole responses at their last token; initializes the critic."""

    num_prompts: PositiveInt = 1024
    """Number of problems whose responses are sampled and verified for training."""
    loss: Literal["bce", "mse", "pairwise"] = "bce"
    """bce: binary cross-entropy. mse: squared error. pairwise: a correct response against a wrong one of the same
    prompt."""
    label_smoothing: Fraction = 0.0
    """Moves the labels of bce away from 0 and 1, which bounds the scores."""
    truncated_share: Fraction = 0.0
    """Fraction of responses truncated at a random token and labeled wrong. It sets how strongly incomplete answers are
    rejected, and so the initialization bias of a critic made from this model."""
    steps: PositiveInt = 100
    """Number of optimizer steps."""
    batch_size: PositiveInt = 64
    """Responses per step; with pairwise loss half as many pairs of a correct and a wrong one."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
