"""Mixtures of experts as config.json of Qwen3-MoE describes them. Needs neither torch nor megatron."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vcppo.errors import UserError

FAMILIES = ("qwen3_moe",)
"""Model types whose layers have experts."""
_SIZES = {"num_experts_per_tok": "per_token", "moe_intermediate_size": "ffn_size"}


@dataclass(frozen=True)
class Experts:
    """The experts of a decoder: in each sparse layer a router chooses some of them for every token."""

    count: int
    """In each sparse layer."""
    per_token: int
    """Experts that a token passes through."""
    ffn_size: int
    """Width of one expert."""
    norm_topk_prob: bool
    """The weights of the chosen experts are divided by their sum."""
    dense_layers: tuple[int, ...]
    """Layers (from 0) that have one ordinary feed-forward network instead."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_layers: int, source: str) -> "Experts":
        """From the parsed content of config.json. Raises UserError for what is missing or malformed."""
        # transformers 5 writes the second name.
        count = config.get("num_experts", config.get("num_local_experts"))
        sizes = {"num_experts": count, **{key: config.get(key) for key in _SIZES}}
        if missing := [key for key, size in sizes.items() if not _is_count(size)]:
            raise UserError(f"{source}: missing or not a positive integer: {', '.join(missing)}")
        step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        if not _is_count(step):
            raise UserError(f"{source}: decoder_sparse_step {step!r} is not a positive integer")
        if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
            raise UserError(f"{source}: mlp_only_layers {listed!r} is not a list of layers")
        if sizes["num_experts_per_tok"] > sizes["num_experts"]:
            raise UserError(
                f"{source}: num_experts_per_tok {sizes['num_experts_per_tok']} of num_experts {sizes['num_experts']}"
            )
        dense = tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)
        if len(dense) == num_layers:
            raise UserError(f"{source}: mlp_only_layers and decoder_sparse_step leave no layer with experts")
        return cls(
            count=sizes["num_experts"],
            per_token=sizes["num_experts_per_tok"],
            ffn_size=sizes["moe_intermediate_size"],
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
            dense_layers=dense,
        )

    @classmethod
    def from_dict(cls, data: Any, num_layers: int, source: str) -> "Experts":
        """Inverse of ``dataclasses.asdict``, also after JSON. Raises UserError for anything else."""
        values: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {}
        dense: Any = values.get("dense_layers")
        norm: Any = values.get("norm_topk_prob")
        sizes: dict[str, Any] = {name: values.get(name) for name in ("count", "per_token", "ffn_size")}
        valid = isinstance(dense, list | tuple) and all(
            type(layer) is int and 0 <= layer < num_layers for layer in dense
        )
        if not valid or type(norm) is not bool or not all(map(_is_count, sizes.values())):
            raise UserError(f"{source}: {data!r} does not describe experts")
        return cls(**sizes, norm_topk_prob=norm, dense_layers=tuple(dense))

    @property
    def number_bytes(self) -> int:
        """Of an expert's number, where engines send it."""
        return 1 if self.count <= 256 else 2

    def sparse_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers (from 0) that have experts."""
        return tuple(layer for layer in range(num_layers) if layer not in self.dense_layers)


def _is_count(size: Any) -> bool:
    """Far above every model's: a larger number is a mistake, and the work to find that out elsewhere would not end."""
    return type(size) is int and 0 < size <= 1 << 16
