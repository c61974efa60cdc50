"""vcppo resume: continue a run with the stages that are not done."""

import argparse
from pathlib import Path

from megatron_vcppo.commands.arguments import (
    add_run_argument,
    add_stage_arguments,
    check_not_queued,
    checked_stages,
    prepare,
)
from megatron_vcppo.commands.submit import print_jobs
from megatron_vcppo.config.sections.cluster import LOCAL
from megatron_vcppo.config.value_sources import path_override
from megatron_vcppo.run.config_file import open_run


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "resume",
        description="Queue the stages of a run that are not done, or run them here; checkpoints are resharded to "
        "a changed layout.",
    )
    add_run_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys to change, such as another layout")
    add_stage_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Submit the rest of the chain, or run it here."""
    folder, config = open_run(args.run_folder)
    if args.overrides:
        folder, config = prepare(folder.config, [path_override("run.dir", Path(config.run.dir)), *args.overrides])
    stages = checked_stages(folder, config, args.first, args.last, args.only)
    if config.cluster.name == LOCAL:
        from megatron_vcppo.launch.local_chain import run_chain

        check_not_queued(folder)
        return run_chain(folder, config, stages)
    from megatron_vcppo.slurm.submission import resolve_python, submit

    print_jobs(stages, submit(folder, config, stages, resolve_python(config)))
    return 0
