"""Section ``sft``."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from megatron_vcppo.config.ranges import NonNegativeInt, PositiveFloat, PositiveInt
from megatron_vcppo.config.sections.training import CheckpointConfig, OptimizerConfig, ScheduleConfig


@dataclass
class SftConfig:
    """Supervised fine-tuning: loss on responses only."""

    train: str = MISSING
    """JSONL file, folder or folder:split of a saved data set, or name or name:split of a `datasets` data set."""
    validation: str | None = None
    """Held-out samples in the same form as sft.train; without a split, the split train is read here too."""
    mix: dict[str, PositiveFloat] = field(default_factory=dict)
    """More sources of training samples, {source: weight}, as in prompts.mix."""
    prompt_key: str = "prompt"
    """Field of the data that holds the prompt, written as in prompts.prompt_key."""
    response_key: str = "response"
    """Field of the data that holds the response, such as generations.0."""
    messages_key: str = "messages"
    """Field of the data that holds a chat; samples that have it are formatted by the tokenizer's chat template."""
    bad_samples: Literal["error", "skip", "truncate"] = "error"
    """Handling of malformed lines, empty responses and samples longer than model.max_length."""
    epochs: PositiveInt = 1
    """Passes over the data; ignored if sft.steps is set."""
    steps: PositiveInt | None = None
    """Number of optimizer steps. Default: from sft.epochs."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step, over all ranks."""
    validate_every: NonNegativeInt = 100
    """Optimizer steps between validation passes; 0: only at the end."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="cosine", warmup_steps=20, min_lr_ratio=0.1)
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
