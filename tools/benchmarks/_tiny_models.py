"""Random tiny Hugging Face models of every supported family, with weights wide enough that a mix-up shows."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 66
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    # A window that is shorter than most test sequences, and heads that do not add up to the hidden size.
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 9, "head_dim": 32}),
    # transformers gives the embedding of a padding token no gradient.
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {"eos_token_id": 1, "pad_token_id": None}),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            **{"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9, "sliding_window_pattern": 2},
            **{"eos_token_id": 1, "pad_token_id": None},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}


def save_tiny_model(folder: Path, family: str = "qwen2", tied: bool = False, seed: int = 0, **sizes: Any) -> Path:
    """Write config.json and model.safetensors of a random float32 model; returns the folder."""
    config_class, model_class, extra = FAMILIES[family]
    base = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**{**base, **extra, **sizes}, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and family != "gemma3_text" else 0.0
            parameter.normal_(mean, 0.1 if parameter.dim() == 1 else 0.08)
    model.save_pretrained(folder)
    return folder
