"""Shared by benchmarks: real ranks, one process each, and a model's sizes to build one from."""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_vcppo.run.processes import free_port


def run_ranks(function: Callable[..., Any], ranks: int, timeout_s: float, *args: Any) -> list[Any]:
    """``function(rank, *args)`` of every rank, each in a new interpreter with the environment that a rank has."""
    # Blocks of 64 KiB and more go back to the system when they are freed, so that what is measured is what is held.
    place = {"MALLOC_MMAP_THRESHOLD_": "65536", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {**place, "MASTER_PORT": str(free_port("127.0.0.1")), "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    with context.Pool(ranks) as pool:
        return pool.starmap_async(function, [(rank, *args) for rank in range(ranks)], chunksize=1).get(timeout_s)


def architecture_folder(args: argparse.Namespace, folder: Path, max_length: int) -> Path:
    """A folder with the config.json of a model of these sizes (hidden, layers, vocab, and experts if there are any);
    weights are random anyway."""
    heads = args.hidden // 64
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4 // 16 * 16,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": args.vocab,
        "max_position_embeddings": max_length,
    }
    family = "qwen2"
    if getattr(args, "experts", None):
        family = "qwen3_moe"
        sizes |= {"num_experts": args.experts, "num_experts_per_tok": args.experts_per_token}
        sizes |= {"moe_intermediate_size": args.expert_width, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": family, "torch_dtype": "float32", **sizes}))
    return folder
