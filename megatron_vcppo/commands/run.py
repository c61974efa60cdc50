"""vcppo run: the chain on this machine."""

import argparse

from megatron_vcppo.commands.arguments import add_chain_arguments, check_not_queued, checked_stages, prepare, print_note
from megatron_vcppo.launch.inherit import stages_to_take
from megatron_vcppo.launch.local_chain import run_chain


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    what = "run the chain on this machine, stage after stage"
    parser = subparsers.add_parser("run", help=what, description=what)
    add_chain_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Resolve and check the configuration, run the stages that are not done."""
    folder, config = prepare(args.config, args.overrides, note=print_note)
    stages = checked_stages(folder, config, args.first, args.last, args.only)
    check_not_queued(folder)
    return run_chain(folder, config, stages, taken=stages_to_take(folder, config, args.base, args.first))
