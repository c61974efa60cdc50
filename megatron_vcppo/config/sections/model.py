"""Section ``model``."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from megatron_vcppo.config.ranges import PositiveFloat, PositiveInt

Dtype = Literal["bfloat16", "float32"]


@dataclass
class ModelConfig:
    """The Hugging Face model from which training starts."""

    hf: str = MISSING
    """Folder of a Hugging Face checkpoint (Qwen2, Qwen2.5, Qwen3, Llama 3): config.json, safetensors, tokenizer."""
    dtype: Dtype = "bfloat16"
    """Type of parameters and activations; gradients are always reduced in float32."""
    max_length: PositiveInt = 4096
    """Maximum length of a sequence (prompt + response) in tokens."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights of a new head (value head, reward head)."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Implementation of the layers: Transformer Engine's kernels, or torch operations in this package's own layers.

    auto: Transformer Engine if it is installed and there is a GPU, else torch.
    """
    fp8: Literal["off", "hybrid"] = "off"
    """8-bit floating point in the matrix products of the layers. hybrid: E4M3 forward, E5M2 for gradients.

    Needs Transformer Engine, bfloat16 and a Hopper, Ada or newer GPU. Weights, their float32 copies, checkpoints and
    exports are the same as without it; micro-batches are padded to a multiple of 16 tokens per rank (blockwise: 128).
    """
    fp8_recipe: Literal["delayed", "current", "blockwise"] = "current"
    """Scaling of the 8-bit tensors: by the largest value of earlier steps (delayed), of the tensor itself (current), or
    of each block (blockwise). delayed is the fastest; its history starts again in each stage and after each resume."""
