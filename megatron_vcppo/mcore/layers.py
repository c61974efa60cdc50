"""The layer specification: Transformer Engine's, or own norm and attention; and the decision between them.

Megatron's local norm refuses sequence parallelism and its local attention refuses packed sequences; the two classes
here take their places, on CPU and on GPUs without Transformer Engine.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vcppo.config import ModelConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.mcore.context_parallel import PackedParams


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether ``model.layers`` selects Transformer Engine. Raises UserError if that is required and not installed."""
    if model.layers == "transformer_engine" and not HAVE_TE:
        raise UserError(
            "model.layers is transformer_engine, which cannot be imported here: install it (tools/setup.sh gpu) or set "
            "model.layers=auto"
        )
    if model.layers == "auto":
        return HAVE_TE and torch.cuda.is_available()
    return model.layers == "transformer_engine"


def unfused_attention() -> str | None:
    """What is wrong if Transformer Engine's last attention in bfloat16 or float16 was its unfused one, else None.

    It falls back silently, for instance where cuDNN's libraries do not fit each other, and then needs memory and time
    that grow with the square of a micro-batch's tokens. In float32 it has no other.
    """
    if not HAVE_TE:
        return None
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as chosen

    parameters = chosen["attention_params"]
    if parameters is None or not chosen["use_unfused_attention"] or parameters.qkv_dtype == torch.float32:
        return None
    return (
        "Transformer Engine has neither fused nor flash attention here, so that attention needs memory with the square "
        "of a micro-batch's tokens; NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 in the environment prints why"
    )


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for the gradient sum that sequence parallelism needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """Causal attention inside each segment of a packed micro-batch, by torch's fused kernels.

    With context parallelism (size ranks) T is this rank's share of the micro-batch's tokens; keys and values of the
    others are gathered, and their gradients are sent back. That costs memory for the whole micro-batch's keys and
    values in every layer, unless activations are recomputed.
    """

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
        packed_seq_params: PackedParams | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads · d]."""
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", "sequences must be packed"
        if packed_seq_params.shard.size > 1:
            return self._over_context(query, key, value, packed_seq_params)
        grouped = query.shape[1] != key.shape[1]
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        # split, not slices: the backward pass of each slice would fill and add a gradient of the whole length.
        parts = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value))
        segments = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(segments, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _over_context(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedParams) -> Tensor:
        """Each of this rank's two chunks of a segment attends to the segment up to the chunk's end."""
        shard, spans = packed.shard, packed.cu_seqlens_q.diff().tolist()
        key, value = shard.gather_keys(key, value)
        # [kv_heads, query heads of one key head, tokens, d]: grouped heads without copies of keys and values.
        query = query.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)
        keys, values = (x.transpose(0, 1).unsqueeze(1).split(spans, dim=2) for x in (key, value))
        chunks = query.split([span // (2 * shard.size) for span in spans for _ in range(2)], dim=2)
        attended = []
        for i, chunk in enumerate(chunks):
            number = shard.rank if i % 2 == 0 else 2 * shard.size - 1 - shard.rank
            seen = (number + 1) * chunk.shape[2]
            k, v = (x[i // 2][:, :, :seen].expand(-1, chunk.shape[1], -1, -1) for x in (keys, values))
            attended.append(_causal_at_the_end(chunk, k, v, self.scale))
        return torch.cat(attended, dim=2).permute(2, 0, 1, 3).flatten(1)


def _causal_at_the_end(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of the last Q of K positions: query […, Q, d], key and value […, K, d] -> […, Q, d]."""
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    mask = everything.tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def block_spec(
    config: TransformerConfig, transformer_engine: bool, adapted: bool = False
) -> ModuleSpec | TransformerBlockSubmodules:
    """The specification of this pipeline stage's layers and final norm.

    adapted: no norm is fused with a linear layer, whose adapters read what the norm makes.
    """
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return _without_fused_norms(spec) if adapted else spec
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _without_fused_norms(spec: ModuleSpec) -> ModuleSpec:
    """The same layer, with parameters under the same names in checkpoints."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = TENorm
    parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    parts.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return spec
