"""Adapters in a Megatron model: a pair of small matrices per Hugging Face layer, next to a base that stays as it is.

The base is frozen: its parameters have no gradients, no place in the gradient buffers and no optimizer state, and two
models may hold the same ones (``share_base``). Every linear layer of Megatron computes as it always does; a hook adds
what its adapters make of the same input. Of the projections that tensor parallelism splits by outputs A is whole on
every rank and B is split; of those that it splits by inputs A is split and B is whole. Between the two matrices the
ranks exchange [tokens, rank] numbers, in the way in which sequence parallelism wants them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_vcppo.config import LoraConfig
from megatron_vcppo.data.seeds import adapter_seed
from megatron_vcppo.hf.adapters import LINEARS, AdapterShape, adapter_shapes, check_model, is_adapter
from megatron_vcppo.hf.architecture import Architecture


class Adapter(MegatronModule):
    """The pair of one Hugging Face layer, or this rank's part of it."""

    def __init__(self, config: TransformerConfig, shape: AdapterShape, lora: LoraConfig, seed: int) -> None:
        """seed: of A's initial values, the same on every rank; B starts at zero."""
        super().__init__(config)
        assert lora.rank is not None
        self.is_row_parallel, self.scale, self.seed = shape.is_row_parallel, lora.alpha / lora.rank, seed
        self.shape, self.out_size = (lora.rank, shape.in_size), shape.out_size
        tp_size = config.tensor_model_parallel_size
        kwargs: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        in_size, out_size = shape.in_size, shape.out_size
        if self.is_row_parallel:
            in_size //= tp_size
        else:
            out_size //= tp_size
        self.lora_A = torch.nn.Parameter(torch.empty(lora.rank, in_size, **kwargs))
        self.lora_B = torch.nn.Parameter(torch.empty(out_size, lora.rank, **kwargs))
        split, whole = (self.lora_A, self.lora_B) if self.is_row_parallel else (self.lora_B, self.lora_A)
        set_tensor_model_parallel_attributes(split, True, dim=1 if self.is_row_parallel else 0, stride=1)
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # its gradients are parts
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """As PEFT starts: A uniform as torch's linear layers have it, B zero. The same values in every layout."""
        rank, in_size = self.shape
        bound = 1 / math.sqrt(in_size)
        full = torch.empty(rank, in_size).uniform_(-bound, bound, generator=torch.Generator().manual_seed(self.seed))
        if self.is_row_parallel:
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            full = full.chunk(self.config.tensor_model_parallel_size, dim=1)[tp_rank]
        self.lora_A.copy_(full)
        self.lora_B.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """What is added to the layer's output: [tokens, 1, out] from the layer's input, both as this rank has them."""
        hidden = F.linear(inputs, self.lora_A)
        if self.is_row_parallel:
            sum_parts = (
                reduce_scatter_to_sequence_parallel_region
                if self.config.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            hidden = sum_parts(hidden)
        elif self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return F.linear(hidden, self.lora_B) * self.scale

    def weight(self) -> Tensor:
        """The same as a float32 addition to this rank's part of the weight: [out, in]."""
        return self.lora_B.detach().float() @ self.lora_A.detach().float() * self.scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Both matrices, as tensor parallelism splits them."""
        split = {"lora_A": 1} if self.is_row_parallel else {"lora_B": 0}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, split, sharded_offsets
        )


class LayerAdapters(MegatronModule):
    """The adapters of one decoder layer, by Hugging Face name."""


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of Megatron and the adapters of the Hugging Face layers in it."""

    linear: torch.nn.Module
    parts: Sequence[tuple[int, Adapter | None]]
    """Of each Hugging Face layer: its rows on this rank, and its adapter."""
    num_groups: int
    """Rows are in this many groups, each with rows of every Hugging Face layer (the key-value groups of linear_qkv)."""

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The layer's output with what its adapters add."""
        added = [
            output.new_zeros(*output.shape[:-1], rows) if adapter is None else adapter(inputs)
            for rows, adapter in self.parts
        ]
        return output + interleave(added, self.num_groups, dim=output.dim() - 1)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The layer's weight on this rank with its adapters in it, of the weight's type; summed in float32."""
        weight: Any = self.linear.weight
        added = [
            torch.zeros(rows, weight.shape[1], device=weight.device) if adapter is None else adapter.weight()
            for rows, adapter in self.parts
        ]
        return (weight.float() + interleave(added, self.num_groups, dim=0)).to(weight.dtype)


def interleave(parts: Sequence[Tensor], num_groups: int, dim: int) -> Tensor:
    """Hugging Face layers' rows, along ``dim``, in the order in which Megatron has them: group by group."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(dim, (num_groups, -1)) for part in parts], dim + 1).flatten(dim, dim + 1)


class Adapters:
    """All adapters on this rank. The model's forward pass has them in it, unless they are off."""

    def __init__(self, model: Any, arch: Architecture, lora: LoraConfig, *, kind: str, seed: int) -> None:
        """Put them into a model, whose parameters are frozen.

        model: a GPTModel. kind: actor | critic, which start from different values. Raises UserError as ``check_model``.
        """
        check_model(arch, lora)
        self.settings, self.is_on, self.is_new = lora, True, True
        self.linears: list[AdaptedLinear] = []
        model.requires_grad_(False)
        shapes, config = adapter_shapes(arch), model.config
        for layer in model.decoder.layers:
            holder = LayerAdapters(config)
            for path, names in LINEARS.items():
                if not any(name in lora.targets for name in names):
                    continue
                linear = layer.get_submodule(path)
                parts: list[tuple[int, Adapter | None]] = []
                for name in names:
                    shape = shapes[name]
                    rows = shape.out_size // (1 if shape.is_row_parallel else config.tensor_model_parallel_size)
                    adapter = None
                    if name in lora.targets:
                        adapter = Adapter(config, shape, lora, adapter_seed(seed, kind, layer.layer_number, name))
                        holder.add_module(name, adapter)
                    parts.append((rows, adapter))
                groups = arch.num_kv_heads // config.tensor_model_parallel_size if "q_proj" in names else 1
                adapted = AdaptedLinear(linear, parts, groups)
                linear.register_forward_hook(self._hook(adapted))
                self.linears.append(adapted)
            layer.add_module("lora", holder)
        if model.pre_process:
            model.embedding.register_forward_hook(ask_for_gradients)

    def reset(self) -> None:
        """As new ones."""
        for adapter in self:
            adapter.reset()
        self.is_new = True

    def __iter__(self) -> Iterator[Adapter]:
        return (adapter for adapted in self.linears for _, adapter in adapted.parts if adapter is not None)

    def merged_weights(self) -> Mapping[int, AdaptedLinear]:
        """By the id of a weight, the layer that it belongs to."""
        return {id(adapted.linear.weight): adapted for adapted in self.linears}

    @torch.no_grad()
    def merge(self) -> None:
        """Put them into the weights below them, which no other model may hold, and stay off."""
        for adapted in self.linears:
            weight: Any = adapted.linear.weight
            weight.copy_(adapted.merged())
        self.is_on = False

    def copy(self) -> list[Tensor] | None:
        """The present values, for ``replaced_by``; None for new adapters, which add nothing."""
        return None if self.is_new else [p.detach().clone() for adapter in self for p in adapter.parameters()]

    @contextmanager
    def replaced_by(self, values: Sequence[Tensor] | None) -> Iterator[None]:
        """Compute with other values, or without adapters."""
        if values is None:
            self.is_on = False
            try:
                yield
            finally:
                self.is_on = True
            return
        mine = [p.data for adapter in self for p in adapter.parameters()]
        kept = [value.clone() for value in mine]
        _copy_each(mine, values)
        try:
            yield
        finally:
            _copy_each(mine, kept)

    def _hook(self, adapted: AdaptedLinear) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            return (adapted.add(inputs[0], output[0]), output[1]) if self.is_on else output

        return hook


def share_base(model: torch.nn.Module, owner: torch.nn.Module) -> bool:
    """Let a model hold another's frozen parameters in place of its own, where both have one; returns whether it has all
    of its base now."""
    theirs = {name: p for name, p in owner.named_parameters() if not is_adapter(name)}
    own = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    for name, parameter in own:
        if name in theirs:
            assert not theirs[name].requires_grad and theirs[name].shape == parameter.shape, name
            module, _, last = name.rpartition(".")
            model.get_submodule(module)._parameters[last] = theirs[name]
    return all(name in theirs for name, _ in own)


def _copy_each(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)


def ask_for_gradients(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A hook of a frozen embedding: a layer whose activations are recomputed gives no gradients if its input needs
    none."""
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output
