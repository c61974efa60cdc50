"""vcppo convert: Hugging Face checkpoints to Megatron's and back, each result checked before it gets its name."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vcppo.hf.convert.copying import Progress

DTYPES = ("float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> None:
    """Arguments of ``vcppo convert import`` and ``vcppo convert export``."""
    parser = subparsers.add_parser("convert", help=__doc__.splitlines()[0], description=__doc__)
    directions = parser.add_subparsers(metavar="import|export", required=True)

    importing = directions.add_parser("import", help="a Hugging Face folder to a Megatron checkpoint")
    importing.add_argument("--hf", type=Path, required=True, help="folder with config.json and *.safetensors")
    importing.add_argument("--out", type=Path, required=True, help="the new checkpoint folder")
    importing.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default 1)")
    importing.add_argument("--pp", type=int, default=1, help="pipeline stages (default 1)")
    importing.set_defaults(run=run, convert=_import)

    exporting = directions.add_parser("export", help="a Megatron checkpoint of any layout to a Hugging Face folder")
    exporting.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="an import, iter_N of a run's stage, or the folder of a done stage",
    )
    exporting.add_argument("--out", type=Path, required=True, help="the new Hugging Face folder")
    exporting.add_argument("--dtype", choices=DTYPES, help="convert the weights (default: as in the checkpoint)")
    exporting.add_argument("--base", type=Path, help="where the model below adapters is (default: where it was)")
    exporting.add_argument("--peft", action="store_true", help="write the adapters alone, for PEFT, not the model")
    exporting.add_argument("--no-verify", action="store_true", help="do not compare logits with Megatron's")
    exporting.set_defaults(run=run, convert=_export)


def run(args: argparse.Namespace) -> int:
    """Convert in the requested direction."""
    args.convert(args)
    return 0


def _import(args: argparse.Namespace) -> None:
    from megatron_vcppo.hf.convert.importer import import_hf

    with _progress("import") as progress:
        arch = import_hf(args.hf, args.out, args.tp, args.pp, progress)
    print(f"{args.out}: {arch.family}, {arch.parameter_count():,} parameters, tp {args.tp} × pp {args.pp}")


def _export(args: argparse.Namespace) -> None:
    import torch

    from megatron_vcppo.hf.convert.adapter_weights import export_peft
    from megatron_vcppo.hf.convert.exporter import actor_folder, export_hf

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.peft:
        print(f"{args.out}: {export_peft(actor_folder(args.checkpoint), args.out, args.base, dtype)}")
        return
    with _progress("export") as progress:  # the logits come after the last byte
        checked = export_hf(args.checkpoint, args.out, dtype, not args.no_verify, progress, args.base)
    print(f"{args.out}: names, shapes, dtypes and sizes are right; {checked}")


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """Bytes, rate and time left on stderr: a bar on a terminal, its last state elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bars.add_task(title, total=None)

    def update(done_bytes: int, total_bytes: int) -> None:
        bars.update(task, completed=done_bytes, total=total_bytes)
        bars.start()  # with the first bytes: a mistake before them costs one line

    try:
        yield update
    finally:
        if bars.live.is_started:
            bars.stop()
