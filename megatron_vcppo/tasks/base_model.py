"""A tiny random Hugging Face model with the tasks' tokenizer: the base checkpoint of the demo and of tests."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from megatron_vcppo.tasks.word_tokenizer import build_tokenizer

# Not Qwen2: for that model type transformers ignores tokenizer.json and puts Qwen2's own splitting in its place.
FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def write_base_model(
    folder: Path,
    family: str = "qwen3",
    num_layers: int = 2,
    width: int = 64,
    head_size: int = 32,
    max_length: int = 1024,
    seed: int = 0,
) -> int:
    """Write config, weights (float32), generation config and tokenizer; returns the number of parameters.

    Args:
        folder: made if missing.
        family: qwen3 | qwen3_moe (8 experts, half as wide as the MLP of the others, 2 per token) | llama.
        num_layers: decoder layers.
        width: hidden size, a multiple of head_size; the MLP is four times as wide.
        head_size: dimensions of an attention head.
        max_length: positions.
        seed: of the random weights.
    """
    tokenizer = build_tokenizer()
    config_class, model_class = FAMILIES[family]
    num_heads = width // head_size
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        **({"head_dim": head_size} if family.startswith("qwen3") else {}),
        **(_experts(width) if family == "qwen3_moe" else {}),
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
        _initialize(model)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **special)
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _experts(width: int) -> dict[str, Any]:
    return {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2 * width,
        "norm_topk_prob": True,
    }


@torch.no_grad()
def _initialize(model: PreTrainedModel) -> None:
    """Hugging Face's standard deviation of 0.02 is for wide models; at width 64 it learns several times slower.

    Matrices are uniform in ±1/√(inputs), torch's own default, embeddings have standard deviation 0.5.
    """
    for name, parameter in model.named_parameters():
        if "embed" in name:
            parameter.normal_(0.0, 0.5)
        elif parameter.dim() >= 2:  # those of all experts of a layer are one tensor
            bound = parameter.shape[-1] ** -0.5
            parameter.uniform_(-bound, bound)
