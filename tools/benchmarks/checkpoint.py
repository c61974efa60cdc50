"""A checkpoint with the distributed optimizer: how long training waits, bytes on disk, memory that it takes."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcppo.config import Config
from megatron_vcppo.hf.architecture import Architecture
from tools.benchmarks._checkpoint_rank import LENGTH, measure
from tools.benchmarks._ranks import architecture_folder, run_ranks

TIMEOUT_S = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, number of ranks, dtypes, which kind of save, where to."""
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dp", type=int, nargs="*", default=[2, 4], help="default: 2 4")
    parser.add_argument("--dtypes", nargs="*", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--saves", nargs="*", choices=["sync", "async"], default=["sync", "async"])
    parser.add_argument("--folder", type=Path, help="on the file system to measure; default: a temporary folder")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One case per dtype, number of ranks and kind of save; of every figure the worst rank's.

    wait_s: that training waits for the save; complete_s: until the checkpoint is complete, with one training step
    meanwhile if it is asynchronous. held_mib: a rank's memory before the save; save_extra_mib: how far the save raises
    it, processes that it starts and, if it is asynchronous, the training step included; step_extra_mib: how far such a
    step alone does. load: model and optimizer. per_rank_mib: what a rank has to write, if all write alike.
    """
    for dtype in args.dtypes:
        for dp in args.dp:
            for kind in args.saves:
                with tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=args.folder) as name:
                    folder = Path(name)
                    config = Config()
                    config.model.hf = str(architecture_folder(args, folder, LENGTH))
                    config.model.dtype, config.model.max_length = dtype, LENGTH
                    config.parallel.dp, config.parallel.distributed_optimizer = dp, True
                    config.sft.checkpoint.async_save = kind == "async"
                    ranks = run_ranks(measure, dp, TIMEOUT_S, config, folder / "checkpoints")
                    written = (folder / "checkpoints" / "iter_0000002").rglob("*")
                    disk_mib = sum(path.stat().st_size for path in written if path.is_file()) / 2**20
                    parameters = Architecture.from_hf(config.model.hf).parameter_count()
                yield {
                    "dtype": dtype,
                    "dp": dp,
                    "save": kind,
                    "parameters_m": round(parameters / 1e6, 1),
                    "disk_mib": round(disk_mib),
                    "per_rank_mib": round(disk_mib / dp),
                    **{key: round(max(rank[key] for rank in ranks), 1) for key in ranks[0]},
                }
