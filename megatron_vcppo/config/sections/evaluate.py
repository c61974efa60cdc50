"""Sections ``evaluate`` and ``export``."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vcppo.config.ranges import NonNegativeFloat, PositiveFraction, PositiveInt


@dataclass
class EvaluateConfig:
    """avg@n, pass@k and maj@k on prompts.test."""

    num_samples: PositiveInt = 1
    """Responses per problem: n of the estimators."""
    k: list[PositiveInt] = field(default_factory=lambda: [1])
    """Values of k for pass@k and maj@k; none above num_samples."""
    num_prompts: PositiveInt | None = None
    """Evaluate only the first N problems; null: all of them."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of the evaluation; 0: greedy."""
    top_p: PositiveFraction = 1.0
    """Nucleus sampling in the evaluation; 1: all tokens."""
    checkpoints: dict[str, str] = field(default_factory=dict)
    """name: Hugging Face folder, to be compared. Default: the results of the chain's stages."""


@dataclass
class ExportConfig:
    """The chain's actor in Hugging Face format, verified."""

    checkpoint: str = "last"
    """last: the final one of the last stage that trains an actor. best: that stage's best by
    checkpoint.keep_best.metric. iter_N: the one of that iteration, if it is still there."""
    out: str | None = None
    """Output folder. Default: RUN/export/hf."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the exported weights. Default: as in model.hf."""
    verify_logits: bool = True
    """Compare the logits of a short prompt with those of the Megatron model."""
    critic: bool = False
    """Also export the critic, to RUN/export/critic."""
    peft: bool = False
    """Also export the actor's adapters, unmerged, as PEFT reads them, to RUN/export/peft; needs model.lora.rank."""
