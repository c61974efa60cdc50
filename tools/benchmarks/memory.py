"""The memory plan (launch/memory_plan.py) against what real ranks of several layouts hold, in float32 on the CPU."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.launch.memory_plan import GIB, plan
from tools.benchmarks._memory_rank import measure
from tools.benchmarks._ranks import architecture_folder, run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp 2": {"tp": 2},
    "tp 2, sequence parallel": {"tp": 2, "sequence_parallel": True},
    "pp 2": {"pp": 2},
    "dp 2, distributed optimizer": {"dp": 2, "distributed_optimizer": True},
    "full recomputation": {"recompute": "full"},
    "pp 2, full recomputation": {"pp": 2, "recompute": "full"},
}
MIXTURE_LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ep 2": {"dp": 2, "ep": 2},
    "ep 2, distributed optimizer": {"dp": 2, "ep": 2, "distributed_optimizer": True},
    "tp 2, ep 2": {"tp": 2, "sequence_parallel": True, "ep": 2},
    "pp 2": {"pp": 2},
    "ep 2, full recomputation": {"dp": 2, "ep": 2, "recompute": "full"},
}
"""Of a model with experts."""
STAGES = ("sft", "value_pretrain", "ppo")
TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, micro-batches, which layouts."""
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens-per-microbatch", type=int, default=1024)
    choices = sorted({*LAYOUTS, *MIXTURE_LAYOUTS})
    parser.add_argument("--layouts", nargs="*", choices=choices, metavar="LAYOUT", help=f"of: {', '.join(choices)}")
    parser.add_argument("--experts", type=int, help="experts of each layer; default: a dense model")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--expert-width", type=int, default=768)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=["sft"], help="default: sft")
    parser.add_argument("--lora-rank", type=int, help="train adapters of this rank on a shared base; default: none")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per layout and stage, GiB on the fullest rank beyond what it holds before it has a model.

    held: weights, gradients and optimizer; peak: the most that a training step over two full micro-batches takes.
    """
    with tempfile.TemporaryDirectory(prefix="bench_memory_") as name:
        hf = architecture_folder(args, Path(name), args.tokens_per_microbatch)
        arch = Architecture.from_hf(hf)
        for stage in args.stages:
            layouts = MIXTURE_LAYOUTS if args.experts else LAYOUTS
            for layout in args.layouts or layouts:
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
    config.parallel.tokens_per_microbatch, config.model.lora.rank = args.tokens_per_microbatch, args.lora_rank
    for key, value in {**LAYOUTS, **MIXTURE_LAYOUTS}[layout].items():
        setattr(config.parallel, key, value)
    return config


def _measure_ranks(config: Config, stage: str) -> list[tuple[int, int]]:
    """(held, peak) in bytes of every rank."""
    parallel = config.parallel
    return run_ranks(measure, parallel.tp * parallel.pp * (parallel.dp or 1), TIMEOUT_S, config, stage)
