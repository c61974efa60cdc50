"""What a decoder is made of, read from a Hugging Face folder's config.json. Needs neither torch nor megatron.

Supported: Qwen2 and Qwen2.5 (model_type qwen2), Qwen3 (qwen3), Qwen3-MoE (qwen3_moe), Llama 3 (llama), Mistral
(mistral), OLMo 2 (olmo2), Gemma 3's text models (gemma3_text). Everything that the Megatron model would silently
compute differently (other rope types, extra biases, Qwen's sliding windows, shared experts, quantized weights) is an
error.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from megatron_vcppo.errors import UserError
from megatron_vcppo.hf import experts
from megatron_vcppo.hf.experts import Experts
from megatron_vcppo.hf.pipeline import Ends, stage_layers
from megatron_vcppo.hf.rope import (
    ROPE_NUMBERS,
    LinearScaling,
    RopeScaling,
    Yarn,
    read_rope_scaling,
    rope_parameters,
)
from megatron_vcppo.run.files import read_json

GELU = "gelu_pytorch_tanh"
_TRAITS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "llama": {},
    "mistral": {},
    "olmo2": {"qk_norm": True, "wide_qk_norm": True, "norms": "post"},
    "gemma3_text": {
        **{"qk_norm": True, "norms": "both", "centered_norms": True, "gelu": True, "scaled_embedding": True},
    },
}
"""By model_type, the switches of ``Architecture`` that no key of config.json tells."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "olmo2": {"rms_norm_eps": 1e-5},
    "gemma3_text": {
        **{"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "hidden_activation": GELU},
        **{"query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6},
        **{"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    },
}
"""What transformers takes where config.json lacks a key, if that differs from the other families'."""
FAMILIES = tuple(_TRAITS)
_WINDOWED = ("mistral", "gemma3_text")
"""Families whose sliding_window is one that counts."""
FULL = "full_attention"
CRITIC_CLASSES = {
    family: f"{name}ForTokenClassification"
    for family, name in (
        *(("qwen2", "Qwen2"), ("qwen3", "Qwen3"), ("qwen3_moe", "Qwen3Moe")),
        *(("llama", "Llama"), ("mistral", "Mistral")),
    )
}
"""Those of transformers; other families have none."""
DTYPES = ("float32", "bfloat16", "float16")
_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


_LARGEST = {
    "num_layers": 10_000,
    "hidden_size": 1 << 20,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "ffn_size": 1 << 24,
    "vocab_size": 1 << 28,
    "max_positions": 1 << 40,
}
"""Far above every model: a larger number is a mistake, and the work to find that out elsewhere would not end."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder-only model."""

    family: str
    """One of ``FAMILIES``."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding as in the Hugging Face checkpoint, not padded."""
    rope_theta: float
    rope_scaling: RopeScaling | LinearScaling | Yarn | None
    max_positions: int
    norm_eps: float
    tied: bool
    """The output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    dtype: str
    """float32 | bfloat16 | float16: the dtype that config.json names."""
    wide_qk_norm: bool = False
    """The norms of queries and keys are over all heads together, not over each."""
    norms: str = "pre"
    """pre: attention and feed-forward layer normalize what they read; post: what they add; both."""
    centered_norms: bool = False
    """A norm multiplies by 1 + its weight."""
    gelu: bool = False
    """The feed-forward layer's gate is GELU (by tanh), not SiLU."""
    scaled_embedding: bool = False
    """What the embedding gives is multiplied by sqrt(hidden_size)."""
    query_scalar: float | None = None
    """Attention scores are divided by its square root; None: by that of head_dim."""
    window: int | None = None
    """How many tokens, its own included, a position attends to; None: all before it."""
    global_layers: tuple[int, ...] = ()
    """Layers, from 0, without the window."""
    local_rope_theta: float | None = None
    """Of the layers with the window, whose rotary embeddings are not scaled; None: as in all."""
    experts: Experts | None = None
    """None: every layer is dense."""
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """config.json as it was read."""

    @classmethod
    def from_hf(cls, path: str | Path) -> "Architecture":
        """Read ``path``/config.json. Raises UserError if it is missing, is not JSON, lacks keys or is not supported."""
        file = Path(path) / "config.json"
        try:
            config = read_json(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; expected the folder of a Hugging Face checkpoint") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as JSON: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{file}: expected a JSON object")
        return cls.from_config(config, source=str(file))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> "Architecture":
        """The same from the parsed content of config.json; ``source`` names it in errors. Raises UserError as there."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UserError(f"{source}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        missing = [key for key in _REQUIRED if not _is_positive_int(config.get(key))]
        if missing:
            raise UserError(f"{source}: missing or not a positive integer: {', '.join(missing)}")
        given, config = config, _DEFAULTS.get(family, {}) | dict(config)
        rope = rope_parameters(config, source)
        if malformed := _malformed(config, rope):
            raise UserError(f"{source}: {'; '.join(malformed)}")
        problems = _unsupported(config, rope)
        if problems:
            raise UserError(f"{source}: not supported: " + "; ".join(problems))
        num_heads = config["num_attention_heads"]
        default_head_dim = 128 if family == "qwen3" else config["hidden_size"] // num_heads
        found = cls(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or default_head_dim,
            ffn_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            rope_theta=float(rope.get("rope_theta") or 10000.0),
            rope_scaling=read_rope_scaling(rope, source),
            max_positions=config["max_position_embeddings"],
            norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype=_dtype(config),
            query_scalar=config.get("query_pre_attn_scalar"),
            window=config["sliding_window"] if family in _WINDOWED else None,
            global_layers=_global_layers(config),
            local_rope_theta=float(rope["local_theta"]) if "local_theta" in rope else None,
            experts=Experts.from_config(config, config["num_hidden_layers"], source)
            if family in experts.FAMILIES
            else None,
            config=dict(given),
            **{"qkv_bias": False, "qk_norm": False} | _TRAITS[family],
        )
        sizes = {name: getattr(found, name) for name in _LARGEST}
        if too_large := [f"{name} {size}" for name, size in sizes.items() if size > _LARGEST[name]]:
            raise UserError(f"{source}: larger than any model: {', '.join(too_large)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``from_dict`` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, source: str = "architecture") -> "Architecture":
        """Inverse of ``to_dict``. Raises UserError, which names ``source``, for anything that it did not make."""
        values = _typed(cls, data, source)
        if (scaling := values["rope_scaling"]) is not None:
            given = set(scaling) if isinstance(scaling, Mapping) else set()
            kind = Yarn if "beta_fast" in given else LinearScaling if given == {"factor"} else RopeScaling
            values["rope_scaling"] = kind(**_typed(kind, scaling, f"{source}.rope_scaling"))
        numbers = (values[name] for name in ("window", "query_scalar", "local_rope_theta"))
        layers = values["global_layers"]
        known = values["norms"] in ("pre", "post", "both") and all(n is None or _is_positive_number(n) for n in numbers)
        if not known or not isinstance(layers, list | tuple) or not all(isinstance(layer, int) for layer in layers):
            raise UserError(f"{source}: norms, window, query_scalar, global_layers or local_rope_theta: no such model")
        values["global_layers"] = tuple(layers)
        if values["experts"] is not None:  # manifests of before have no such key
            values["experts"] = Experts.from_dict(values["experts"], values["num_layers"], f"{source}.experts")
        if not isinstance(values["config"], Mapping):
            raise UserError(f"{source}: config is no object")
        if wrong := [f"{name} {values[name]}" for name, most in _LARGEST.items() if not 0 < values[name] <= most]:
            raise UserError(f"{source}: out of range: {', '.join(wrong)}")
        return cls(**values)

    @classmethod
    def of_manifest(cls, folder: Path, meta: Mapping[str, Any]) -> "Architecture":
        """The architecture that the manifest of a checkpoint names. Raises UserError if it is malformed."""
        return cls.from_dict(meta.get("architecture"), f"{folder}: damaged manifest: architecture")

    def differences(self, wanted: "Architecture") -> str:
        """What makes this another model than ``wanted``, such as "num_layers 4 (not 2)"; "" if nothing does."""
        names = [f.name for f in fields(self) if f.compare and getattr(self, f.name) != getattr(wanted, f.name)]
        return ", ".join(f"{name} {getattr(self, name)} (not {getattr(wanted, name)})" for name in names)

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or all value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def qk_norm_sizes(self) -> tuple[int, ...]:
        """Weights of the norm of queries and of that of keys; () without them."""
        sizes = (self.q_size, self.kv_size) if self.wide_qk_norm else (self.head_dim, self.head_dim)
        return sizes if self.qk_norm else ()

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers (from 0) that have experts."""
        return self.experts.sparse_layers(self.num_layers) if self.experts else ()

    def parameter_count(self) -> int:
        """Parameters of the Hugging Face checkpoint; tied embeddings count once, padding not at all."""
        norms = (4 if self.norms == "both" else 2) * self.hidden_size + sum(self.qk_norm_sizes)
        biases = self.q_size + 2 * self.kv_size if self.qkv_bias else 0
        layers = self.num_layers * (norms + biases) + self._matrix_parameters(active=False)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return layers + embeddings + self.hidden_size

    def active_parameter_count(self) -> int:
        """The same, with only the experts that one token passes through."""
        return self.parameter_count() - self._matrix_parameters(active=False) + self._matrix_parameters(active=True)

    def expert_parameter_count(self) -> int:
        """Parameters of all experts of all layers, which expert parallelism divides."""
        if self.experts is None:
            return 0
        one = 3 * self.hidden_size * self.experts.ffn_size
        return len(self.sparse_layers) * self.experts.count * one

    def training_flops(self, sequence_lengths: Iterable[int]) -> int:
        """Floating-point operations of one forward and backward pass over sequences of these lengths (tokens).

        Matrix products only: 2 per parameter and token forward, twice that backward; causal attention scores and
        their product with the values cost length² × q_size each (half of the full square; with a window, the band of
        it that is attended to), per layer, forward. Recomputation is not counted (model FLOPs, as in PaLM's MFU,
        arXiv:2204.02311 appendix B), nor are experts that a token does not pass through.
        """
        lengths = list(sequence_lengths)
        per_token = self._matrix_parameters(active=True) + self.vocab_size * self.hidden_size
        whole = self.num_layers if self.window is None else len(self.global_layers)
        bands = [length**2 - max(0, length - (self.window or length)) ** 2 for length in lengths]
        squares = whole * sum(length**2 for length in lengths) + (self.num_layers - whole) * sum(bands)
        attention = 2 * self.q_size * squares
        return 3 * (2 * per_token * sum(lengths) + attention)

    def check_parallel(
        self, tp: int, pp: int, ep: int = 1, sequence_parallel: bool = True, ends: Ends = (None, None)
    ) -> None:
        """Raises UserError, with the numbers, if ``tp`` tensor, ``pp`` pipeline and ``ep`` expert-parallel ranks cannot
        split the model.

        sequence_parallel: whether tensor-parallel ranks divide the tokens outside of attention.
        ends: layers of the first and of the last pipeline stage, if they are given.
        """
        problems = [
            f"{name} {size} is not divisible by tp {tp}"
            for name, size in (
                ("attention heads", self.num_heads),
                ("key-value heads", self.num_kv_heads),
                ("feed-forward size", self.ffn_size),
            )
            if tp < 1 or size % tp
        ]
        try:
            stage_layers(self.num_layers, pp, ends)
        except UserError as error:
            problems.append(str(error))
        if self.experts is None and ep > 1:
            problems.append(f"it has no experts for parallel.ep {ep} to divide")
        if self.experts is not None and (ep < 1 or self.experts.count % ep):
            problems.append(f"experts {self.experts.count} are not divisible by ep {ep}")
        if self.experts is not None and tp > 1 and not sequence_parallel:
            problems.append(f"its experts with tp {tp} need parallel.sequence_parallel: set it to true")
        if problems:
            raise UserError("this model cannot be split as configured: " + "; ".join(problems))

    def check_exportable(self, kind: str) -> None:
        """Raises UserError if transformers has no class for an export of this kind (actor, critic)."""
        if kind == "critic" and self.family not in CRITIC_CLASSES:
            raise UserError(
                f"transformers has no {self.family} for token classification, which a critic is exported to"
            )

    def check_length(self, max_length: int) -> None:
        """Raises UserError, with the numbers, if sequences may be longer than the model's positions."""
        if max_length > self.max_positions:
            more = ""
            if isinstance(self.rope_scaling, Yarn):
                made_for = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
                more = f"; YaRN's factor × original_max_position_embeddings is {made_for}"
            raise UserError(
                f"model.max_length {max_length} is more than the model's {self.max_positions} positions "
                f"(max_position_embeddings in its config.json{more})"
            )

    def _matrix_parameters(self, *, active: bool) -> int:
        """Of all layers; active: only of the experts that one token passes through."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        sparse, total = len(self.sparse_layers), self.num_layers * attention
        if self.experts is not None:
            run = self.experts.per_token if active else self.experts.count
            total += sparse * self.hidden_size * (self.experts.count + 3 * run * self.experts.ffn_size)
        return total + (self.num_layers - sparse) * 3 * self.hidden_size * self.ffn_size


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _typed(cls: type, data: Any, source: str) -> dict[str, Any]:
    """The fields of a dataclass from what JSON holds. UserError if one is missing or of another type."""
    values: dict[str, Any] = {}
    for one in fields(cls):
        default = None if one.default is MISSING else one.default  # of what a manifest made before lacks
        value = data.get(one.name, default) if isinstance(data, Mapping) else None
        wanted = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}.get(cast(type, one.type))
        if wanted and type(value) not in wanted:
            raise UserError(f"{source}: {one.name} {value!r} is no {wanted[-1].__name__}")
        values[one.name] = value
    return values


def _malformed(config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """Keys with a default whose value is of another kind; null counts as absent, as in transformers."""
    problems = []
    for key in ("num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern", "query_pre_attn_scalar"):
        if config.get(key) is not None and not _is_positive_int(config[key]):
            problems.append(f"{key} {config[key]!r} is not a positive integer")
    for key, value in (("rms_norm_eps", config.get("rms_norm_eps")), *((key, rope.get(key)) for key in ROPE_NUMBERS)):
        if value is not None and not _is_positive_number(value):
            problems.append(f"{key} {value!r} is not a positive number")
    if not isinstance(config.get("layer_types") or [], list):
        problems.append(f"layer_types {config['layer_types']!r} is not a list")
    elif (
        config["model_type"] in _WINDOWED
        and config.get("layer_types")
        and len(config["layer_types"]) != config["num_hidden_layers"]
    ):
        problems.append(f"layer_types has {len(config['layer_types'])} entries, not num_hidden_layers")
    if config.get("use_sliding_window") and not isinstance(config.get("max_window_layers", 0), int):
        problems.append(f"max_window_layers {config['max_window_layers']!r} is not a whole number")
    return problems


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _unsupported(config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """Every feature of this config that the Megatron model does not have, with what it has instead."""
    problems = []
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        problems.append(f"rope type {rope['rope_type']!r} (supported: default, linear, llama3, yarn)")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        problems.append("partial rotary embeddings (supported: the whole head)")
    key, act = ("hidden_activation", GELU) if "hidden_activation" in config else ("hidden_act", "silu")
    if config.get(key, act) != act:
        problems.append(f"{key} {config[key]!r} (supported: {act})")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if config.get(key):
            problems.append(f"{key} {config[key]!r} (supported: none)")
    if _uses_sliding_window(config):
        problems.append("a sliding window (supported: those of Mistral and Gemma 3)")
    if config.get("attention_bias"):
        problems.append("attention_bias, a bias on the output projection (supported: none, or Qwen2's on q, k, v)")
    if config.get("mlp_bias"):
        problems.append("mlp_bias (supported: feed-forward layers without bias)")
    if config["model_type"] not in experts.FAMILIES and (config.get("num_experts") or config.get("num_local_experts")):
        problems.append(f"mixture of experts (supported: of {', '.join(experts.FAMILIES)})")
    if config.get("shared_expert_intermediate_size"):
        problems.append("shared experts (supported: routed experts only)")
    if config.get("quantization_config"):
        problems.append("quantized weights (supported: " + ", ".join(DTYPES) + ")")
    if _dtype(config) not in DTYPES:
        problems.append(f"dtype {_dtype(config)} (supported: {', '.join(DTYPES)})")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % kv_heads:
        problems.append(f"{heads} attention heads over {kv_heads} key-value heads (supported: equal groups)")
    if not config.get("head_dim") and config["model_type"] != "qwen3" and config["hidden_size"] % heads:
        problems.append(f"hidden_size {config['hidden_size']} over {heads} heads without head_dim (must divide)")
    return problems


def _global_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Of Gemma, whose other layers have a window; none of other models."""
    if "sliding_window_pattern" not in config:
        return ()
    num_layers, every = config["num_hidden_layers"], config["sliding_window_pattern"] or 6
    kinds = config.get("layer_types") or ["sliding_attention" if (i + 1) % every else FULL for i in range(num_layers)]
    return tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)


def _uses_sliding_window(config: Mapping[str, Any]) -> bool:
    layer_types = config.get("layer_types")
    if config["model_type"] in _WINDOWED:
        return False
    if layer_types:
        return any(kind != FULL for kind in layer_types)
    if not config.get("use_sliding_window"):
        return False
    # Layers from max_window_layers on have the window; many configs switch it on for none.
    return config.get("max_window_layers", 0) < config["num_hidden_layers"]
