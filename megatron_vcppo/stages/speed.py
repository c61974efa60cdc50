"""How fast a step was: tokens per second, share of the devices' peak (MFU), peak memory."""

import functools
from collections.abc import Iterable, Mapping

from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.device_speed import device_peak_tflops, peak_memory_gib
from megatron_vcppo.mcore.model import torch_dtype
from megatron_vcppo.stages.stage import Stage

TOKENS, TFLOP = "speed/tokens", "speed/model_tflop"


def work(stage: Stage, lengths: Iterable[int], passes: float = 1.0) -> dict[str, float]:
    """What a step works through, as metrics that a stage logs.

    Args:
        stage: whose model it is.
        lengths: tokens of each sequence of the step, over all ranks.
        passes: how often a model sees them forward and backward; a forward pass alone is a third. A critic counts as an
            actor.
    """
    found = [int(length) for length in lengths]
    flops = passes * _architecture(stage.config.model.hf).training_flops(found)
    return {TOKENS: float(sum(found)), TFLOP: flops / 1e12}


@functools.cache
def _architecture(folder: str) -> Architecture:
    return Architecture.from_hf(folder)


class SpeedMeter:
    """Turns the work of a step and its seconds into rates; on one rank, for all of them."""

    def __init__(self, stage: Stage) -> None:
        runtime, self.num_ranks = stage.runtime, stage.runtime.world_size
        self.device = runtime.device
        self.peak = device_peak_tflops(runtime.device, torch_dtype(stage.config.model.dtype))
        """TFLOP/s of one rank; None: not known."""

    def metrics(self, logged: Mapping[str, float], seconds: float) -> dict[str, float]:
        """logged: with the metrics of ``work``; seconds: of the whole step, generation included.

        ``speed/mfu``: model FLOPs, without recomputation, over the peak of all ranks; peak memory: this rank's, in GiB.
        """
        tokens_per_s, tflop_per_s = logged[TOKENS] / seconds, logged[TFLOP] / seconds
        found = {
            "speed/tokens_per_s": tokens_per_s,
            "speed/tokens_per_s_per_rank": tokens_per_s / self.num_ranks,
            "speed/peak_memory_gib": peak_memory_gib(self.device),
        }
        return found | ({"speed/mfu": tflop_per_s / (self.peak * self.num_ranks)} if self.peak else {})
