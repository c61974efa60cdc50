"""Small random models of every family, as Hugging Face folders made without transformers, and learners over them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_vcppo.config import Dtype, ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import PackedMicrobatch, pack_all, rounding
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.hf.mapping import hf_shapes, parameters
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor, Critic
from megatron_vcppo.mcore.model import build_actor, build_critic
from megatron_vcppo.records import TrainSequence

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    # Every token passes through all experts: with some of them, rounding would now and then choose others.
    "qwen3_moe": {"head_dim": 64, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
                  "norm_topk_prob": False},
    "llama": {"rope_parameters": ROPE},
}  # fmt: skip
SIZES = {"full": {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 4000, "intermediate_size": 1024},
         "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 200, "intermediate_size": 256}}  # fmt: skip


def write_model(folder: Path, family: str, size: str) -> Path:
    """config.json and float32 weights; heads of 64, which every attention kernel takes."""
    sizes = SIZES[size]
    heads = sizes["hidden_size"] // 64
    config = {"model_type": family, "num_attention_heads": heads, "num_key_value_heads": heads // 2, "dtype": "float32",
              "max_position_embeddings": 1024, **sizes, **FAMILIES[family]}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in hf_shapes(parameters(Architecture.from_config(config))).items():
        noise = torch.randn(shape, generator=generator)
        # Wide enough that a mix-up shows, narrow enough that bf16 stays comparable.
        weights[name] = 1 + 0.1 * noise if "norm" in name else noise / sizes["hidden_size"] ** 0.5
    save_file(weights, folder / "model.safetensors")
    return folder


def microbatches(arch: Architecture, seed: int, size: str) -> list[PackedMicrobatch]:
    """Sequences of mixed lengths; every token but the first four of each has a loss."""
    generator = torch.Generator().manual_seed(seed)
    longest, count = (300, 12) if size == "full" else (40, 6)
    sequences = []
    for _ in range(count):
        length = int(torch.randint(8, longest, (), generator=generator))
        ids = torch.randint(0, arch.vocab_size, (length,), generator=generator).tolist()
        sequences.append(TrainSequence(tuple(ids), {"loss_mask": (False,) * 4 + (True,) * (length - 4)}))
    return pack_all(sequences, 2 * longest, *rounding(ParallelConfig()))


def num_loss_tokens(batch: list[PackedMicrobatch]) -> int:
    """The denominator of a batch's loss."""
    return sum(int(microbatch.fields["loss_mask"].sum()) for microbatch in batch)


def learner(kind: str, folder: Path, dtype: Dtype = "float32", lr: float = 0.0, **parallel: Any) -> Any:
    """An actor or critic of one rank, whose world ``runtime.start`` made, with the folder's weights; no clipping."""
    arch, layout = Architecture.from_hf(folder), ParallelConfig(**parallel)
    config = ModelConfig(hf=str(folder), dtype=dtype)
    model = (build_actor if kind == "actor" else build_critic)(arch, config, layout)
    load_hf(model, folder)
    optimizer = OptimizerConfig(lr=lr, clip_grad=0.0)
    return (Actor if kind == "actor" else Critic)(model, layout, optimizer, ScheduleConfig(), total_steps=100)


def critic_loss(denominator: int) -> Any:
    """Squared distance of values from 1."""

    def loss(values: torch.Tensor, microbatch: PackedMicrobatch) -> tuple[torch.Tensor, dict[str, Any]]:
        mask = microbatch.fields["loss_mask"]
        return torch.where(mask, (values - 1).square(), 0.0).sum() / denominator, {}

    return loss
