"""Section ``value_pretrain``."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vcppo.config.ranges import NonNegativeFloat, PositiveInt
from megatron_vcppo.config.sections.training import CheckpointConfig, OptimizerConfig, ScheduleConfig


@dataclass
class ValuePretrainConfig:
    """The critic learns Monte-Carlo returns (λ = 1) of the fixed SFT policy (VC-PPO, section 3.2)."""

    init: Literal["sft", "reward_model", "random_head", "checkpoint"] = "reward_model"
    """Initial trunk and head. sft: the SFT actor's trunk, new head. random_head: model.hf's trunk, new head.
    reward_model: that stage's trunk and head. checkpoint: value_pretrain.checkpoint_path."""
    checkpoint_path: str | None = None
    """Folder of a critic inside a checkpoint (…/iter_0000100/critic), or a checkpoint of Megatron-LM (torch_dist) of a
    language model, whose trunk gets a new head; required by init checkpoint."""
    rollouts: Literal["fresh", "stored"] = "fresh"
    """fresh: every step trains once on new rollouts. stored: one set is generated, kept, and used for all steps."""
    stored_path: str | None = None
    """Folder of a stored set; generated if it does not exist. Default: RUN/value_pretrain/rollouts."""
    stored_rollouts: PositiveInt = 4096
    """Number of rollouts in a stored set."""
    steps: PositiveInt = 100
    """Maximum number of optimizer steps (the exact number if stop_when_stable is off)."""
    batch_size: PositiveInt = 512
    """Rollouts per step."""
    stop_when_stable: bool = False
    """Stop before `steps` once explained variance and value loss have both changed by less than the tolerance between
    the last two windows."""
    stable_window: PositiveInt = 10
    """Steps averaged in a window."""
    stable_tolerance: NonNegativeFloat = 0.02
    """Absolute for explained variance, relative for the value loss."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that stay as they are in pretraining; patterns as in ppo.critic.frozen."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
