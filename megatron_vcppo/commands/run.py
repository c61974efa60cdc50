"""vcppo run: the chain on this machine."""

import argparse

from megatron_vcppo.commands.arguments import add_chain_arguments, chosen_stages, prepare
from megatron_vcppo.launch.checks import check_inputs
from megatron_vcppo.launch.inherit import take_stages
from megatron_vcppo.launch.local_chain import run_chain


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser("run", help="run the chain on this machine, stage after stage")
    add_chain_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Resolve and check the configuration, run what is not done."""
    folder, config = prepare(args.config, args.overrides)
    stages = chosen_stages(list(config.stages), args.first, args.last, args.only)
    check_inputs(config, [stage for stage in stages if not folder.stage(stage).marked_done()])
    if args.base:
        take_stages(folder, config, args.base, args.first)
    return run_chain(folder, config, stages)
