"""Section ``weight_sync``."""

from dataclasses import dataclass
from typing import Literal

from megatron_vcppo.config.ranges import PositiveFloat, PositiveInt


@dataclass
class WeightSyncConfig:
    """The push of the actor's weights to the engines before each iteration's generation."""

    transport: Literal["network", "disk"] = "network"
    """network: broadcast from the trainer's ranks (NCCL on GPUs, gloo on CPU). disk: safetensors in the run folder, for
    clusters whose trainer and rollout nodes share only a file system. With cluster.engines_on trainer_gpus, network
    means the memory of each node (/dev/shm) if its ranks hold a whole replica of the actor, else gloo, because NCCL
    does not support two ranks on one GPU."""
    offload_weights: bool = False
    """With cluster.engines_on trainer_gpus: also keep the weights of actor, critic and reference in host memory while
    engines generate, as is always done with optimizer state and gradients."""
    bucket_mib: PositiveInt = 64
    """Size of the buckets in which weights are sent, in MiB; a sending rank holds two of them."""
    pause: Literal["drain", "keep"] = "drain"
    """drain: engines finish running responses before they load weights. keep: they pause them and continue with the new
    weights."""
    timeout_s: PositiveFloat = 600.0
    """Deadline of a push in seconds, from the pause to the last tensor."""
