"""FP8 matrix products through Megatron and Transformer Engine: the settings, and what refuses them.

Parameters stay in bfloat16, with the optimizer's float32 copies; a layer makes its weight's 8-bit copy in the first
micro-batch of every pass. Checkpoints hold no FP8 state: "current" and "blockwise" scales have none, and the history
that "delayed" scales come from is a pickle, which Transformer Engine refuses to load unless an environment variable
allows it. So a resume with "delayed" starts its history again, as a new run does: the first micro-batch is computed
with scales of one, in which small gradients vanish.
"""

from typing import Any

from megatron_vcppo.config import ModelConfig, ParallelConfig
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.layers import uses_transformer_engine

_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}
"""Megatron's names."""
_WIDTH = 16
"""Elements of which every matrix dimension must be a multiple."""


def fp8_settings(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """The FP8 fields of a TransformerConfig; empty without FP8. Raises UserError if it cannot run here."""
    if model.fp8 == "off":
        return {}
    if not uses_transformer_engine(model):
        raise UserError(
            f"model.fp8 is {model.fp8}, which needs Transformer Engine and a GPU: install it (tools/setup.sh gpu) or "
            "set model.fp8=off"
        )
    import transformer_engine.pytorch as te

    available, reason = te.is_fp8_available(return_reason=True)
    if available and model.fp8_recipe == "blockwise":
        available, reason = te.is_fp8_block_scaling_available(return_reason=True)
    if not available:
        raise UserError(f"model.fp8 is {model.fp8} ({model.fp8_recipe}), which this GPU does not have: {reason}")
    odd = [f"{name} {size}" for name, size in _widths(arch, parallel.tp).items() if size % _WIDTH]
    if odd:
        raise UserError(
            f"model.fp8 needs widths that are multiples of {_WIDTH} on each rank, with tp {parallel.tp} there are: "
            + ", ".join(odd)
        )
    history: dict[str, Any] = {}
    if model.fp8_recipe == "delayed":
        # Scales are agreed on after every pass: over the ranks of a replica only, for other replicas may have other
        # numbers of micro-batches, and each rank would wait for passes that the others do not make.
        history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max", "tp_only_amax_red": True}
    return {"fp8": model.fp8, "fp8_recipe": _RECIPES[model.fp8_recipe], **history}


def _widths(arch: Architecture, tp: int) -> dict[str, int]:
    return {
        "hidden size": arch.hidden_size,
        "query, key and value": (arch.q_size + 2 * arch.kv_size) // tp,
        "attention output": arch.q_size // tp,
        "feed-forward": arch.ffn_size // tp,
    }
