"""The layer specification: Transformer Engine's where it is installed, else own norm and attention.

Megatron's local norm refuses sequence parallelism and its local attention refuses packed sequences; the two classes
here take their places, on CPU and on GPUs without Transformer Engine.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def have_transformer_engine() -> bool:
    """True where CUDA and Transformer Engine are both there."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for the gradient sum that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """Causal attention inside each segment of a packed micro-batch, by torch's fused kernels."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads · d]."""
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", "sequences must be packed"
        grouped = query.shape[1] != key.shape[1]
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        # split, not slices: the backward pass of each slice would fill and add a gradient of the whole length.
        parts = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value))
        segments = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(segments, dim=2).squeeze(0).transpose(0, 1).flatten(1)


def block_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """The specification of this pipeline stage's layers and final norm."""
    if have_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
