"""Sections ``returns`` and ``values``, which value pretraining and PPO share."""

from dataclasses import dataclass

from megatron_vcppo.config.ranges import FiniteFloat, Fraction, NonNegativeInt, PositiveFloat


@dataclass
class ReturnsConfig:
    """From verdicts to the returns that the critic learns, in value pretraining and in PPO."""

    gamma: Fraction = 1.0
    """Discount per token."""
    overlong_penalty_tokens: NonNegativeInt = 0
    """DAPO's soft overlong punishment: over the last N tokens before rollout.max_tokens the reward falls linearly by up
    to 1; 0: no penalty."""
    overlong_filter: bool = False
    """Exclude responses that were truncated at rollout.max_tokens from the losses."""


@dataclass
class ValuesConfig:
    """The critic's values and their regression, in value pretraining and in PPO."""

    bounds: list[FiniteFloat] | None = None
    """[low, high]: map the critic's outputs smoothly into this range, such as that of the rewards. Default:
    unbounded."""
    huber_delta: PositiveFloat | None = None
    """Errors larger than this count linearly (Huber loss); null: squared error."""
