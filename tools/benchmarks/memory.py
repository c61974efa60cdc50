"""The memory plan (slurm/memory.py) beside what real ranks of several layouts hold, in float32 on the CPU."""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.mcore.architecture import Architecture
from slurm.memory import GIB, plan
from slurm.roles import free_port
from tools.benchmarks._memory_rank import measure

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp 2": {"tp": 2},
    "tp 2, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "pp 2": {"pp": 2},
    "dp 2, distributed optimizer": {"dp": 2, "distributed_optimizer": True},
    "full recomputation": {"recompute": "full"},
    "pp 2, full recomputation": {"pp": 2, "recompute": "full"},
}
STAGES = ("sft", "value_pretrain", "ppo")
TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, micro-batches, which layouts."""
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=["sft"], help="default: sft")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per layout and stage, GiB on the fullest rank beyond what it holds before it has a model.

    held: weights, gradients and optimizer; peak: the most that a training step over two full micro-batches takes.
    """
    with tempfile.TemporaryDirectory(prefix="bench_memory_") as name:
        hf = _architecture(args, Path(name))
        arch = Architecture.from_hf(hf)
        for stage in args.stages:
            for layout in args.layouts:
                config = _config(args, hf, layout)
                parts = plan(arch, config, stage)
                planned_held = sum(parts[part] for part in ("weights", "gradients", "optimizer"))
                planned_peak = sum(parts.values()) - parts["overhead"]
                held, peak = (max(values) / GIB for values in zip(*_measure_ranks(config, stage), strict=True))
                yield {
                    "stage": stage,
                    "layout": layout,
                    "parameters_m": round(arch.parameter_count() / 1e6, 1),
                    **{f"{part}_gib": round(size, 3) for part, size in parts.items() if part != "overhead"},
                    "planned_held_gib": round(planned_held, 3),
                    "held_gib": round(held, 3),
                    "planned_peak_gib": round(planned_peak, 3),
                    "peak_gib": round(peak, 3),
                    "planned_over_peak": round(planned_peak / peak, 2),
                }


def _config(args: argparse.Namespace, hf: Path, layout: str) -> Config:
    config = Config()
    config.model.hf, config.model.dtype, config.model.max_length = str(hf), "float32", args.tokens_per_microbatch
    config.parallel.tokens_per_microbatch = args.tokens_per_microbatch
    for key, value in LAYOUTS[layout].items():
        setattr(config.parallel, key, value)
    return config


def _measure_ranks(config: Config, stage: str) -> list[tuple[int, int]]:
    """(held, peak) in bytes of every rank."""
    parallel = config.parallel
    ranks = parallel.tp * parallel.pp * (parallel.dp or 1)
    # Blocks of 64 KiB and more go back to the system when they are freed, so that what is measured is what is held.
    place = {"MALLOC_MMAP_THRESHOLD_": "65536", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {**place, "MASTER_PORT": str(free_port("127.0.0.1")), "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    with context.Pool(ranks) as pool:
        return pool.starmap_async(measure, [(config, stage, rank) for rank in range(ranks)], chunksize=1).get(TIMEOUT_S)


def _architecture(args: argparse.Namespace, folder: Path) -> Path:
    """A folder with the config.json of a model of these sizes; weights are random anyway."""
    heads = args.hidden // 64
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 11 // 4 // 16 * 16,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": args.vocab,
        "max_position_embeddings": args.tokens_per_microbatch,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "float32", **sizes}))
    return folder
