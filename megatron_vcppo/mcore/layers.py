"""The layer specification: Transformer Engine's, or own norm and attention; and the decision between them.

Megatron's local norm refuses sequence parallelism and its local attention refuses packed sequences; the two classes
here take their places, on CPU and on GPUs without Transformer Engine.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vcppo.config import ModelConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.context_parallel import PackedParams
from megatron_vcppo.mcore.routing import Router, SparseLayer


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
    """RMSNorm whose weight is marked for the gradient sum that sequence parallelism needs. Gemma's weight is less 1."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same."""
        if not self.centered:
            on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
            return _RMSNormOnCPU.apply(x, self.weight, self.eps) if on_cpu else super().forward(x)
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), self.eps).type_as(x)


class _RMSNormOnCPU(torch.autograd.Function):
    """torch's own has no kernel on the CPU: its backward pass is a dozen operations, and takes 3 times as long.

    With r = 1 / sqrt(mean x² + eps): y = x r w, ∂/∂w = Σ g x r, ∂/∂x = r (g w - x r² mean(g w x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        products = (grad * x).flatten(0, -2)
        mean = products.mv(weight).view_as(scale).div_(x.shape[-1])
        grad_x = (grad * weight).mul_(scale).addcmul_(x, mean.mul_(scale**3), value=-1)
        return grad_x, products.t().mv(scale.flatten()), None


class WideRMSNorm(MegatronModule):
    """RMSNorm over all heads together, of which this rank has a part (OLMo 2's norms of queries and keys)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, num_heads: int) -> None:
        """hidden_size: of a head."""
        super().__init__(config)
        tp_size = config.tensor_model_parallel_size
        self.size, self.eps, self.shape = num_heads * hidden_size, eps, (num_heads // tp_size, hidden_size)
        weight = torch.ones(self.size // tp_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, 1, heads of this rank, d] -> the same."""
        wide = x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        # Each rank's part of the loss depends on the sum: its gradient is summed, too.
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = wide * torch.rsqrt(squares / self.size + self.eps)
        return (normed * self.weight.float().view(self.shape)).type_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight, split over the tensor-parallel ranks like the heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class _NormedOutput:
    """In front of a row-parallel linear layer: normalizes what it adds to the residual stream."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)  # type: ignore[call-arg]
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x)  # type: ignore[misc]
        return self.post_layernorm(output), bias


class NormedRowParallelLinear(_NormedOutput, RowParallelLinear):
    """Megatron's."""


if HAVE_TE:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    class NormedTERowParallelLinear(_NormedOutput, TERowParallelLinear):
        """Transformer Engine's."""


class LocalOrGlobalAttention(SelfAttention):
    """Takes its own of two rotary embeddings: of layers without and with a window (Gemma 3)."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """rotary_pos_emb: [length, 1, 1, 2 · d], the angles of both kinds, twice."""
        both = rotary_pos_emb.unflatten(-1, (2, 2, -1))
        own = both[..., int(has_window(self.config, self.layer_number)), :].flatten(-2)
        return super().forward(*args, rotary_pos_emb=own, **options)


def has_window(config: TransformerConfig, layer_number: int) -> bool:
    """Whether the layer (from 1) attends to a window only."""
    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)


class PackedAttention(MegatronModule):
    """Causal attention inside each segment of a packed micro-batch, by torch's fused kernels.

    With context parallelism (size ranks) T is this rank's share of the micro-batch's tokens; keys and values of the
    others are gathered, and their gradients are sent back. That costs memory for the whole micro-batch's keys and
    values in every layer, unless activations are recomputed.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int = 1, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.window = config.window_size[0] + 1 if config.window_size and has_window(config, layer_number) else None

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
        segments = [self._attend(q, k, v, enable_gqa=grouped) for q, k, v in zip(*parts, strict=True)]
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
            attended.append(self._attend(chunk, k, v))
        return torch.cat(attended, dim=2).permute(2, 0, 1, 3).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Causal attention of the last Q of K positions: query […, Q, d], key and value […, K, d] -> […, Q, d]."""
        num_queries, num_keys = query.shape[-2], key.shape[-2]
        windowed = self.window is not None and num_keys > self.window
        if num_queries == num_keys and not windowed:
            options["is_causal"] = True
        else:
            everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = everything.tril(num_keys - num_queries)
            if self.window is not None:
                mask = mask.triu(num_keys - num_queries - self.window + 1)
            options["attn_mask"] = mask
        return F.scaled_dot_product_attention(query, key, value, scale=self.scale, **options)


def block_spec(
    config: TransformerConfig, arch: Architecture, transformer_engine: bool, adapted: bool = False
) -> ModuleSpec | TransformerBlockSubmodules:
    """The specification of this pipeline stage's layers and final norm.

    adapted: no norm is fused with a linear layer, whose adapters read what the norm makes.
    """
    sparse_layers = arch.sparse_layers
    if transformer_engine and not sparse_layers:
        spec = _layer_spec(config, arch, transformer_engine, is_sparse=False)
        return _without_fused_norms(spec) if adapted and arch.norms != "post" else spec
    first = get_transformer_layer_offset(config)
    layers = range(first, first + get_num_layers_to_build(config))
    norm = TENorm if transformer_engine else RMSNorm
    specs = {is_sparse: _layer_spec(config, arch, transformer_engine, is_sparse) for is_sparse in (False, True)}
    return TransformerBlockSubmodules([specs[layer in sparse_layers] for layer in layers], norm)


def _layer_spec(config: TransformerConfig, arch: Architecture, transformer_engine: bool, is_sparse: bool) -> ModuleSpec:
    num_experts = config.num_moe_experts if is_sparse else None
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
        )
    else:
        layer = get_gpt_layer_local_spec(num_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    if not transformer_engine:
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp if arch.norms == "post" else RMSNorm
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if arch.wide_qk_norm:
        attention.q_layernorm = ModuleSpec(WideRMSNorm, params={"num_heads": arch.num_heads})
        attention.k_layernorm = ModuleSpec(WideRMSNorm, params={"num_heads": arch.num_kv_heads})
    if arch.local_rope_theta is not None:
        parts.self_attention.module = LocalOrGlobalAttention
    if arch.norms != "pre":
        linear = NormedTERowParallelLinear if transformer_engine else NormedRowParallelLinear
        attention.linear_proj = mlp.linear_fc2 = linear
        if transformer_engine and arch.norms == "post":  # those of the specification normalize what they read
            attention.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
    if is_sparse:
        layer.module = SparseLayer
        mixture: MoESubmodules = mlp
        mixture.router = Router
        # Named as with Transformer Engine: no matrix product of this norm alone could take it in.
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return layer


def _without_fused_norms(spec: ModuleSpec) -> ModuleSpec:
    """The same layer, with parameters under the same names in checkpoints."""
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = TENorm
    parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    parts.sharded_state_dict_keys_map = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return spec
