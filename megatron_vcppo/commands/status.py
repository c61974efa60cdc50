"""vcppo status: where a run stands."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_vcppo.commands.arguments import add_run_argument
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.run.log import printable

if TYPE_CHECKING:
    from megatron_vcppo.slurm.chain_status import StageStatus


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser("status", description="Stages, Slurm states, attempts, progress, and what failed.")
    add_run_argument(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="again every few seconds, until everything has ended")
    how.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="with --watch")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; exit code 1 if a stage failed."""
    from megatron_vcppo.slurm.chain_status import run_status, table
    from megatron_vcppo.slurm.slurm_cli import Unreachable

    folder, config = open_run(args.run_folder, complete=False)
    clear = "\033[2J\033[H" if sys.stdout.isatty() else ""
    while True:
        try:
            statuses = run_status(folder, config)
        except Unreachable as error:
            if not args.watch:
                raise
            print(f"{time.strftime('%H:%M:%S')}  {printable(str(error))}; asking again", flush=True)
            time.sleep(args.every)
            continue
        active = any(status.state in ("running", "pending") for status in statuses)
        if args.json:
            print(json.dumps({"run": str(folder.path), "stages": [asdict(status) for status in statuses]}, indent=2))
            return exit_code(statuses)
        if args.watch:
            print(f"{clear}{time.strftime('%H:%M:%S')}  {printable(str(folder.path))}")
        print(table(statuses, sys.stdout), flush=True)
        if not (args.watch and active):
            return exit_code(statuses)
        time.sleep(args.every)


def exit_code(statuses: "list[StageStatus]") -> int:
    """1 if a stage failed."""
    return int(any(status.state in ("failed", "damaged") for status in statuses))
