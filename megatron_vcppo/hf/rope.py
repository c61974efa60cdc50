"""How a model's rotary embeddings are scaled to more positions, read from its config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_vcppo.errors import UserError

ROPE_NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "local_theta"),
)
"""Keys whose values are positive numbers where they are there."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent scaling of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LinearScaling:
    """Rotary embeddings of positions divided by ``factor``."""

    factor: float


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): rotary embeddings for ``factor`` times as many positions as the model was made for."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    """Rotary pairs that turn at least this often in the original context keep their frequency."""
    beta_slow: float
    """Those that turn at most this often are slowed down by ``factor``; between the two the change is linear."""
    attention_factor: float
    """Queries and keys are multiplied by it after the rotation."""
    truncate: bool
    """Whether the bounds of that linear part are rounded outwards to whole pairs."""


def rope_parameters(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """transformers 5 keeps everything in ``rope_parameters``; before, ``rope_theta`` and ``rope_scaling``."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise UserError(f"{source}: {key} {config[key]!r} is not an object")
    rope = dict(config.get("rope_scaling") or {})
    given = dict(config.get("rope_parameters") or {})
    if "rope_local_base_freq" in config:  # Gemma: one for each kind of layer
        local = given.get("sliding_attention") or {}
        given = given.get("full_attention") or {}
        if not all(isinstance(each, Mapping) for each in (local, given)):
            raise UserError(f"{source}: rope_parameters: full_attention or sliding_attention is not an object")
        if local.get("rope_type", "default") != "default":
            raise UserError(f"{source}: not supported: rope type {local['rope_type']!r} of sliding_attention")
        rope["local_theta"] = local.get("rope_theta") or config["rope_local_base_freq"] or 1e4
    types = [each.get("rope_type", each.get("type", "default")) for each in (rope, given)]
    if rope and given and types[0] != types[1] and "local_theta" not in rope:
        raise UserError(
            f"{source}: rope_scaling has type {types[0]!r}, rope_parameters {types[1]!r}: remove one of the two"
        )
    rope |= given
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def read_rope_scaling(rope: Mapping[str, Any], source: str) -> RopeScaling | LinearScaling | Yarn | None:
    """What ``rope_parameters`` say. UserError for a number that is missing; ``Architecture.from_config``
    refuses other types."""
    kind = rope["rope_type"]
    if kind == "default":
        return None
    needed = [f.name for f in fields(RopeScaling)]
    if kind in ("yarn", "linear"):
        needed = ["factor", "original_max_position_embeddings"][: 1 if kind == "linear" else 2]
    if missing := [name for name in needed if rope.get(name) is None]:
        raise UserError(f"{source}: rope scaling {kind} lacks {', '.join(missing)}")
    if kind == "linear":
        return LinearScaling(float(rope["factor"]))
    factor, positions = float(rope["factor"]), int(rope["original_max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(factor, float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), positions)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=positions,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=_attention_factor(rope, factor),
        truncate=bool(rope.get("truncate", True)),
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """As given, or the paper's, which mscale and mscale_all_dim (DeepSeek's keys) change where both are there."""

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    return of(mscale) / of(all_dims) if mscale and all_dims else of(1.0)
