"""Turns a llama GGUF file into a Hugging Face folder: python gguf_to_hf.py FILE.gguf OUT.

Weights are dequantized to float32; configuration, tokenizer and chat template come from the file's metadata. Left out:
other families and tokenizers than byte-level BPE.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Argument of a tokenizer: GGUF's name of the token."""
CONTROL_TOKEN = 3
"""GGUF's type of tokens that never come from text."""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a tensor: Hugging Face's, without the layer."""


def convert(source: Path, out: Path) -> None:
    """Write ``out``; its config.json comes last, so a folder that has one is complete.

    Raises ValueError for a file that is no llama model with a byte-level tokenizer.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"{source}: only llama models with a byte-level BPE tokenizer can be converted")
    config = hf_config(fields)
    weights = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            weight = halves_of_heads(weight, config[heads])
        weights[name] = torch.from_numpy(weight)
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer(fields).save_pretrained(out)
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    for name, content in (("generation_config.json", ends), ("config.json", config)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hf_config(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json of transformers' Llama from the metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight: model.layers.3.self_attn.q_proj.weight."""
    matched = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if matched is None or matched[2] not in NAMES:
        raise ValueError(f"tensor {name} is not part of a llama model that can be converted")
    layer = f"model.layers.{matched[1]}." if matched[1] else ""
    return f"{layer}{NAMES[matched[2]]}.weight"


def halves_of_heads(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in Hugging Face's order: [heads × head_dim, hidden] of both.

    Rotary embeddings turn pairs of rows: in GGUF neighbors, in transformers row i and i + head_dim / 2 of a head.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, hidden))


def tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE of the metadata, with its chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    pairs = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    made.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == CONTROL_TOKEN])
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="FILE.gguf")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    convert(args.source, args.out)
