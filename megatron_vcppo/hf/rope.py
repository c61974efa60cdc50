"""Rotary frequencies, with Llama 3's scaling of long wavelengths."""

import math

import torch
from torch import Tensor

from megatron_vcppo.hf.architecture import Architecture


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Angular frequency of each rotary pair: [head_dim / 2] float32.

    Llama 3.1's scaling: wavelengths above original_context / low_freq_factor are stretched by ``factor``, those
    below original_context / high_freq_factor are kept, and between the two the change is linear in
    original_context / wavelength.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequencies = 1.0 / (arch.rope_theta**exponents)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
