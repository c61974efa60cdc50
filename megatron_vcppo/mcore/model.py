"""Building the Megatron actor and critic of an architecture for this rank's tensor and pipeline position."""

import abc
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vcppo.config import LoraConfig, ModelConfig, ParallelConfig
from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.adapters import BaseWeights, StoredAdapters, is_adapter
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.mapping import padded_vocab_size
from megatron_vcppo.hf.pipeline import stage_layers
from megatron_vcppo.hf.rope import LinearScaling, Yarn
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.context_parallel import WHOLE, ContextShard
from megatron_vcppo.mcore.fp8 import fp8_settings
from megatron_vcppo.mcore.layers import block_spec, uses_transformer_engine
from megatron_vcppo.mcore.lora import Adapters
from megatron_vcppo.mcore.routing import RoutedParams, RouterStep, routed_tokens, routers


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a configuration's dtype name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


HEAD = "value_head."
"""What the names of a critic's own parameters begin with."""


class PackedGPT(GPTModel, abc.ABC):
    """A GPTModel over one packed micro-batch; ``readout`` is what the last pipeline stage makes of hidden states."""

    kind: str
    replays_routing = False
    """Whether its routers take the experts that engines chose, from micro-batches that have them."""

    def __init__(self, config: TransformerConfig, arch: Architecture, lora: LoraConfig, *, tied: bool) -> None:
        super().__init__(
            config,
            block_spec(config, arch, config.transformer_impl == "transformer_engine", adapted=lora.rank is not None),
            vocab_size=padded_vocab_size(arch.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=arch.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
        )
        self.arch = arch
        self.router_step: RouterStep | None = None
        """What the routers share; None: no layer of the model has experts."""
        frequencies = [inverse_frequencies(arch)]
        if arch.local_rope_theta is not None:  # LocalOrGlobalAttention takes one of the two
            frequencies.append(inverse_frequencies(replace(arch, rope_theta=arch.local_rope_theta, rope_scaling=None)))
        self.rotary_pos_emb.inv_freq = torch.cat(frequencies).to(torch.cuda.current_device())
        if arch.scaled_embedding and self.pre_process:
            scale = torch.tensor(math.sqrt(arch.hidden_size)).to(config.params_dtype).item()  # rounded, as by others
            self.embedding.register_forward_hook(lambda module, given, output: output * scale)
        self.register_load_state_dict_post_hook(_forgive_extra_state)
        self.adapters: Adapters | None = None
        self.base: BaseWeights | None = None
        """What is below the adapters, once it is loaded."""
        if lora.rank is None:
            _add_gradients_in_place(self)
        else:
            self.adapters = Adapters(self, arch, lora, kind=self.kind, seed=runtime.current().seed)

    @property
    def stored_adapters(self) -> StoredAdapters | None:
        """What a checkpoint says of the adapters, which it has in place of the base."""
        if self.adapters is None:
            return None
        assert self.base is not None, "a base is loaded before training starts"
        return StoredAdapters(self.adapters.settings, self.base)

    def is_stored(self, name: str) -> bool:
        """Whether a checkpoint of this model has a parameter (by its name in the model): with adapters not the base."""
        return self.adapters is None or is_adapter(name) or name.startswith(HEAD)

    def set_router_losses(self, aux_loss_coef: float, z_loss_coef: float) -> None:
        """Share the losses' coefficients among the routers; without experts there is nothing to do."""
        if self.arch.experts is not None:
            num_layers = len(self.arch.sparse_layers)
            self.router_step = RouterStep(self.arch.experts, num_layers, aux_loss_coef, z_loss_coef)
            for router in routers(self):
                router.step = self.router_step

    def run(self, microbatch: PackedMicrobatch, shard: ContextShard = WHOLE) -> Tensor:
        """Hidden states [T (/ tp with sequence parallelism), 1, hidden], or the readout on the last stage.

        shard: this rank's tokens, which the result is about; see ``context_parallel.shard_of``.
        """
        longest = microbatch.max_seqlen
        packed = RoutedParams(
            qkv_format="thd",
            cu_seqlens_q=microbatch.cu_seqlens,
            cu_seqlens_kv=microbatch.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            shard=shard,
            tokens=routed_tokens(microbatch, shard, self.config, self.replays_routing) if self.router_step else None,
        )
        token_ids, position_ids = shard.take(microbatch.token_ids), shard.take(microbatch.position_ids)
        return self(token_ids[None], position_ids[None], None, packed_seq_params=packed)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The parameters' shards, without the modules' extra state (FP8 scales): nothing here uses it.

        Which modules have one depends on the layer specification; a checkpoint must not.
        """
        return _parameters_only(super().sharded_state_dict(prefix, sharded_offsets, metadata))

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.readout(hidden_states) if self.post_process else hidden_states

    @abc.abstractmethod
    def readout(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [T (/ tp with sequence parallelism), 1, hidden] -> what losses are computed from: [T, …]."""


class ActorModel(PackedGPT):
    """The policy: reads out logits [T, padded vocabulary / tp]."""

    kind = "actor"
    replays_routing = True

    def __init__(self, config: TransformerConfig, arch: Architecture, lora: LoraConfig) -> None:
        super().__init__(config, arch, lora, tied=arch.tied)

    def readout(self, hidden_states: Tensor) -> Tensor:
        """Logits [T, padded vocabulary / tp], of the model's dtype."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return logits.squeeze(1)


class ValueHead(MegatronModule):
    """hidden -> 1, the same on every tensor-parallel rank; float32 whatever the model is.

    In bfloat16 values near 1 would move in steps of 0.004 to 0.008, as large as the errors that the critic learns from.
    """

    def __init__(self, config: TransformerConfig, init_std: float, seed: int) -> None:
        super().__init__(config)
        kwargs: dict[str, Any] = {"dtype": torch.float32, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty(1, config.hidden_size, **kwargs))
        self.bias = torch.nn.Parameter(torch.zeros(1, **kwargs))
        # Its own generator, seeded alike on every rank, so that the head is the same in every layout.
        generator = torch.Generator().manual_seed(seed % 2**63)
        weight = torch.empty(1, config.hidden_size).normal_(std=init_std, generator=generator)
        self.weight.data.copy_(weight)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [tokens, 1, hidden] -> float32 [tokens, 1]."""
        return F.linear(hidden_states.float(), self.weight, self.bias).squeeze(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Both parameters whole on every rank, under the names of a plain state dict."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )


class CriticModel(PackedGPT):
    """The critic: reads out values [T] in float32; no vocabulary projection."""

    kind = "critic"

    def __init__(
        self, config: TransformerConfig, arch: Architecture, lora: LoraConfig, *, init_std: float, seed: int
    ) -> None:
        """init_std, seed: of the value head's normal initialization."""
        super().__init__(config, arch, lora, tied=False)
        if self.post_process:
            del self.output_layer
            self.value_head = ValueHead(config, init_std, seed)

    def readout(self, hidden_states: Tensor) -> Tensor:
        """Values float32 [T]."""
        values = self.value_head(hidden_states)
        if self.config.sequence_parallel:
            # Every rank computes the same loss from the gathered values: its gradient needs no sum.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values.squeeze(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As in PackedGPT, without GPTModel's own version, which needs the output layer that a critic has not."""
        return _parameters_only(MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata))


def build_actor(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> ActorModel:
    """The actor on this rank; its weights are undefined until a checkpoint is loaded."""
    actor = ActorModel(transformer_config(arch, model, parallel), arch, model.lora)
    actor.set_router_losses(model.router_aux_loss_coef, model.router_z_loss_coef)
    return actor


def build_critic(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> CriticModel:
    """The critic on this rank; its trunk is undefined until a checkpoint is loaded, its head is new.

    The head's weights are drawn with the seed of ``runtime.start``.
    """
    config = transformer_config(arch, model, parallel)
    critic = CriticModel(config, arch, model.lora, init_std=model.init_std, seed=runtime.current().seed)
    critic.set_router_losses(model.router_aux_loss_coef, model.router_z_loss_coef)
    return critic


def transformer_config(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration of this architecture and layout. Raises UserError if the layout does not fit."""
    # A dense reward model may run next to a mixture, whose experts are divided.
    ep = parallel.ep if arch.experts else 1
    arch.check_parallel(parallel.tp, parallel.pp, ep, parallel.sequence_parallel, parallel.ends)
    dtype = torch_dtype(model.dtype)
    fused = uses_transformer_engine(model)
    if fused and parallel.cp > 1 and dtype == torch.float32:
        raise UserError(
            f"parallel.cp {parallel.cp} with model.dtype float32: Transformer Engine has no attention over several "
            "ranks in float32; set model.dtype=bfloat16 or model.layers=torch"
        )
    if fused and parallel.cp > 1 and arch.window:
        raise UserError(
            f"parallel.cp {parallel.cp} with a sliding window: Transformer Engine's attention over several ranks has "
            "none; set parallel.cp=1 or model.layers=torch"
        )
    recomputes: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=partial(F.gelu, approximate="tanh") if arch.gelu else F.silu,
        layernorm_zero_centered_gamma=arch.centered_norms,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        # Megatron sums the gradients of norms that it knows of over the tensor-parallel ranks; wide ones are split.
        qk_layernorm=arch.qk_norm and not arch.wide_qk_norm,
        softmax_scale=softmax_scale(arch),
        window_size=(arch.window - 1, 0) if arch.window else None,
        window_attn_skip_freq=[int(layer not in arch.global_layers) for layer in range(arch.num_layers)],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        pipeline_model_parallel_layout=_pipeline_layout(arch, parallel),
        context_parallel_size=parallel.cp,
        # Transformer Engine's ring of keys and values: it takes packed sequences and any number of heads.
        cp_comm_type="p2p" if parallel.cp > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Weights always come from a checkpoint, but only initialization marks them as tensor-parallel, and the
        # gradient norm counts unmarked ones on one rank only.
        perform_initialization=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Packed micro-batches differ in length. The dispatcher's type is required even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **_experts_settings(arch, model, parallel),
        batch_p2p_comm=torch.cuda.is_available(),
        transformer_impl="transformer_engine" if fused else "local",
        # Without Transformer Engine or apex the fusions are jitted on first use, 5 to 25 s each, or missing. That of
        # gradients is set per layer (``_add_gradients_in_place``): Megatron's output layer has it with apex only.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused and not arch.gelu,
        bias_dropout_fusion=fused,
        **recomputes[parallel.recompute],
        **fp8_settings(arch, model, parallel),
    )


def _pipeline_layout(arch: Architecture, parallel: ParallelConfig) -> list[list[str]] | None:
    """What each pipeline stage holds, for Megatron; None where all have as many layers."""
    layers = stage_layers(arch.num_layers, parallel.pp, parallel.ends)
    if len(set(layers)) == 1:
        return None
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def softmax_scale(arch: Architecture) -> float | None:
    """What attention scores are multiplied by, if it is not 1 / sqrt(head_dim).

    YaRN's factor of both queries and keys is a factor of the scores: fused rotary kernels have none.
    """
    yarn, divisor = arch.rope_scaling, math.sqrt(arch.query_scalar or arch.head_dim)
    if isinstance(yarn, Yarn):
        return yarn.attention_factor**2 / divisor
    return 1 / divisor if arch.query_scalar else None


def _experts_settings(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """The fields about experts of a TransformerConfig; empty without them. Raises UserError for what they exclude."""
    experts = arch.experts
    if experts is None:
        return {}
    if model.fp8 != "off":
        raise UserError("model.fp8 does not work with a mixture of experts: set it to off")
    sparse = [int(layer not in experts.dense_layers) for layer in range(arch.num_layers)]
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        # A list has checkpoints keep every layer by itself, instead of all stacked: only where layers differ.
        "moe_layer_freq": sparse if experts.dense_layers else 1,
        # What this package's router leaves to Megatron: only that its own losses are off, and float32 logits.
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": uses_transformer_engine(model),
        "moe_permute_fusion": uses_transformer_engine(model) and torch.cuda.is_available(),
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": 1,
    }


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Angular frequency of each rotary pair: [head_dim / 2] float32.

    Scaled, a pair's frequency is kept, divided by ``factor`` or between the two. Llama 3.1: between them linear in the
    number of turns in the original context. YaRN: linear in the pair's number.
    """
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequencies = 1.0 / (arch.rope_theta**exponents)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Yarn):
        kept = _kept_by_yarn(scaling, arch.rope_theta, arch.head_dim)
    else:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _kept_by_yarn(yarn: Yarn, theta: float, head_dim: int) -> Tensor:
    """[head_dim / 2]: 1 up to the pair that makes beta_fast turns in the original context, 0 from beta_slow's on."""

    def pair(turns: float) -> float:
        length = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    first, last = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    # 0.001: as transformers and vLLM have it where both bounds are one pair.
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)


def _add_gradients_in_place(model: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add weight gradients to the float32 buffer inside the matrix product.

    Without it each micro-batch makes a gradient in the weights' type, which is then added.
    """
    module: Any  # the attribute is that of some classes only
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _forgive_extra_state(module: torch.nn.Module, keys: Any) -> None:
    """Transformer Engine's modules miss the extra state that ``sharded_state_dict`` omits; only parameters count."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith("_extra_state")]


def _parameters_only(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}
