"""vcppo doctor: is this cluster profile right?"""

import argparse
from pathlib import Path

from megatron_vcppo.config.sections.cluster import LOCAL
from megatron_vcppo.config.value_sources import profile_files


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        description="Check Slurm's commands, the partition, the shared file system, the nodes' Python and network, a "
        "collective over all nodes and the start of a tiny engine with short test jobs; on GPU clusters also the "
        "driver, Transformer Engine, the compiler, and all GPUs against what their links carry. One line each, with "
        "what to do.",
    )
    parser.add_argument("--cluster", required=True, metavar="NAME", help="profile in configs/cluster/, or a YAML file")
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs will live (default: here)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit code 1 if something is wrong."""
    from megatron_vcppo.config.load import load_config
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.slurm.doctor_checks import examine
    from megatron_vcppo.slurm.submission import resolve_python

    if args.cluster == LOCAL:
        raise UserError("--cluster local has no Slurm to check")
    if not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: no such folder")
    config = load_config(profile_files(args.cluster)[0], complete=False)
    return 0 if examine(config, resolve_python(config), args.folder.absolute()) else 1
