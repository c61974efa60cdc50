"""Section ``hardware``: the figures from which `vcppo plan` estimates times."""

from dataclasses import dataclass

from megatron_vcppo.config.ranges import NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt


@dataclass
class HardwareConfig:
    """What the cluster's GPUs and disks do. Only `vcppo plan` reads it; the defaults are an H100's (SXM)."""

    tflops: PositiveFloat = 989.0
    """Peak of one rank's device in TFLOP/s, dense, in model.dtype."""
    mfu: PositiveFraction = 0.4
    """Fraction of that peak which training and prefilling reach (model FLOPs, without recomputation)."""
    memory_gb_per_s: PositiveFloat = 3350.0
    """Memory bandwidth of one device in GB/s."""
    memory_share: PositiveFraction = 0.6
    """Fraction of that bandwidth which generation reaches."""
    nvlink_gb_per_s: PositiveFloat = 450.0
    """Bandwidth between the devices of a node in GB/s, per device and direction."""
    step_ms: NonNegativeFloat = 5.0
    """Time of an engine's step that does not depend on its work, in ms: scheduling, sampling, launches."""
    disk_gb_per_s: PositiveFloat = 5.0
    """Rate in GB/s at which all ranks together write checkpoints."""
    prompt_tokens: PositiveInt = 256
    """Mean length of a prompt in tokens."""
    response_tokens: PositiveInt | None = None
    """Mean length of a response, and of an SFT sample's, in tokens. Default: rollout.max_tokens."""
    longest_tokens: PositiveInt | None = None
    """Length of the longest response of a batch, with which generation ends. Default: rollout.max_tokens."""
