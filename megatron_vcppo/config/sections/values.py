"""Section ``values``."""

from dataclasses import dataclass

from megatron_vcppo.config.ranges import FiniteFloat, PositiveFloat


@dataclass
class ValuesConfig:
    """The critic's values and their regression, in value pretraining and in PPO."""

    bounds: list[FiniteFloat] | None = None
    """[low, high]: map the critic's outputs smoothly into this range, such as that of the rewards. Default:
    unbounded."""
    huber_delta: PositiveFloat | None = None
    """Errors larger than this count linearly (Huber loss); null: squared error."""
