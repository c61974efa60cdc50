"""Low-rank adapters (LoRA, arXiv:2106.09685): which layers have one, of what sizes, and what a checkpoint says of them.

An adapter adds alpha / rank × B·A to the weight of one Hugging Face linear layer: A [rank, in], B [out, rank]. There is
one per Hugging Face layer, also where Megatron computes several of these at once, so that PEFT reads them as they are.
Needs neither torch nor Megatron.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vcppo.config import LoraConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture

LINEARS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
"""Megatron's linear layers of a decoder layer → the Hugging Face layers that each computes, in its row order."""
ROW_PARALLEL = ("o_proj", "down_proj")
"""Layers whose inputs tensor parallelism splits; of the others it splits the outputs."""
MATRICES = ("lora_A", "lora_B")
META_KEY = "lora"
"""Of a component's manifest."""


@dataclass(frozen=True)
class AdapterShape:
    """One adapter of a decoder layer."""

    name: str
    """Of the Hugging Face layer, such as q_proj."""
    in_size: int
    out_size: int

    @property
    def is_row_parallel(self) -> bool:
        """Whether tensor parallelism splits A (along the inputs); else it splits B (along the outputs)."""
        return self.name in ROW_PARALLEL

    @property
    def hf_module(self) -> str:
        """Within a decoder layer, such as self_attn.q_proj."""
        return ("self_attn." if self.name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp.") + self.name


def adapter_shapes(arch: Architecture) -> dict[str, AdapterShape]:
    """By name, of all layers that can have an adapter."""
    hidden, ffn = arch.hidden_size, arch.ffn_size
    sizes = {
        "q_proj": (hidden, arch.q_size),
        "k_proj": (hidden, arch.kv_size),
        "v_proj": (hidden, arch.kv_size),
        "o_proj": (arch.q_size, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }
    return {name: AdapterShape(name, *size) for name, size in sizes.items()}


def check_model(arch: Architecture, lora: LoraConfig) -> None:
    """Raise UserError if adapters cannot be put into this architecture."""
    if lora.rank is None:
        return
    if arch.experts is not None:
        raise UserError("model.lora.rank: mixtures of experts take no adapters: set it to null")
    normed = [name for name in lora.targets if name in ROW_PARALLEL]
    if arch.norms != "pre" and normed:  # Megatron's layer of these projections has the norm in it
        raise UserError(
            f"model.lora.targets: {' and '.join(normed)} of {arch.family} are followed by a norm, before which no "
            "adapter can be added: leave them out"
        )


def adapter_parameters(arch: Architecture, lora: LoraConfig, tp: int = 1) -> float:
    """Parameters of all adapters of one model; with tensor parallelism those on one rank, over all pipeline stages."""
    assert lora.rank is not None
    count = 0.0
    for name in lora.targets:
        shape = adapter_shapes(arch)[name]
        split, whole = (shape.in_size, shape.out_size) if shape.is_row_parallel else (shape.out_size, shape.in_size)
        count += lora.rank * (split / tp + whole)
    return count * arch.num_layers


def is_adapter(name: str) -> bool:
    """Whether a parameter of a Megatron model is an adapter's."""
    return ".lora." in name


def checkpoint_key(name: str, matrix: str) -> str:
    """Key of an adapter's matrix in a distributed checkpoint, where layers are stacked along a leading axis."""
    return f"decoder.layers.lora.{name}.{matrix}"


@dataclass(frozen=True)
class BaseWeights:
    """The weights below adapters: what a checkpoint of adapters points to."""

    kind: str
    """hf: a Hugging Face folder. checkpoint: the component of a training checkpoint that has all weights."""
    path: str
    """Where they were when training started."""
    fingerprint: str
    """Equal for equal weights, wherever they are."""


@dataclass(frozen=True)
class StoredAdapters:
    """What the manifest of a component says of its adapters."""

    lora: LoraConfig
    base: BaseWeights

    def to_dict(self) -> dict[str, Any]:
        """For a manifest, under ``META_KEY``."""
        settings = {"rank": self.lora.rank, "alpha": self.lora.alpha, "targets": [*self.lora.targets]}
        return settings | {"base": asdict(self.base)}

    @classmethod
    def of_manifest(cls, folder: Path, meta: Mapping[str, Any]) -> "StoredAdapters | None":
        """None for a component with all weights. Raises UserError if the manifest is damaged."""
        stored = meta.get(META_KEY)
        if stored is None:
            return None
        try:
            rank, alpha, targets = stored["rank"], stored["alpha"], stored["targets"]
            base = BaseWeights(**stored["base"])
            is_sound = type(rank) is int and rank > 0 and isinstance(alpha, int | float) and alpha > 0
            is_sound &= bool(targets) and set(targets) <= {name for names in LINEARS.values() for name in names}
            is_sound &= base.kind in ("hf", "checkpoint") and isinstance(base.path, str)
            if not is_sound:
                raise ValueError(f"{stored!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: damaged manifest: {META_KEY}: {error}") from None
        return cls(LoraConfig(rank, float(alpha), [*targets]), base)

    def check_settings(self, folder: Path, lora: LoraConfig) -> None:
        """Raise UserError if a model with these settings cannot take the adapters."""
        if not self.matches(lora):
            raise UserError(
                f"{folder}: has adapters of model.lora.rank={self.lora.rank} model.lora.alpha={self.lora.alpha:g} "
                f"model.lora.targets=[{','.join(self.lora.targets)}]: set these, or take another run.dir"
            )

    def matches(self, lora: LoraConfig) -> bool:
        """Whether a model with these settings has the same adapters."""
        same = (self.lora.rank, self.lora.alpha) == (lora.rank, lora.alpha)
        return same and set(self.lora.targets) == set(lora.targets)
