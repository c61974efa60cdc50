"""vcppo submit: the chain into Slurm, or onto this machine with --cluster local."""

import argparse

from megatron_vcppo.commands.arguments import add_chain_arguments, check_not_queued, checked_stages, prepare, print_note
from megatron_vcppo.config.sections.cluster import LOCAL
from megatron_vcppo.launch.inherit import stages_to_take
from megatron_vcppo.run.files import read_text


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "submit",
        description="Queue the chain: one job per stage, each after the success of the one before; done stages are "
        "skipped. With --cluster local the stages run here, one after another.",
    )
    add_chain_arguments(parser)
    parser.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    parser.add_argument("--dry-run", action="store_true", help="write the batch scripts and their graph, queue nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Submit, or run here."""
    folder, config = prepare(args.config, args.overrides, args.cluster, note=print_note)
    stages = checked_stages(folder, config, args.first, args.last, args.only)
    taken = stages_to_take(folder, config, args.base, args.first)
    if config.cluster.name == LOCAL and not args.dry_run:
        from megatron_vcppo.launch.local_chain import run_chain

        check_not_queued(folder)
        return run_chain(folder, config, stages, taken=taken)
    from megatron_vcppo.slurm.submission import dry_run, resolve_python, submit

    if args.dry_run:
        written = dry_run(folder, config, stages, resolve_python(config))
        print(read_text(written / "graph.txt"), end="")
        print(f"batch scripts in {written}; nothing was submitted")
        return 0
    print_jobs(stages, submit(folder, config, stages, resolve_python(config), taken))
    print(f"watch with: vcppo status {folder.path} --watch")
    return 0


def print_jobs(stages: list[str], jobs: dict[str, str]) -> None:
    """One line per stage."""
    for stage in stages:
        print(f"{stage:<16} " + (f"job {jobs[stage]}" if stage in jobs else "done before"))
