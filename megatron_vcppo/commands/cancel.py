"""vcppo cancel: end the jobs of a run."""

import argparse

from megatron_vcppo.commands.arguments import add_run_argument
from megatron_vcppo.run.config_file import open_run


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser("cancel", description="Cancel the jobs of a run; vcppo resume continues later.")
    add_run_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """scancel, dependents first."""
    from megatron_vcppo.run import events
    from megatron_vcppo.run.access import following
    from megatron_vcppo.slurm.submission import active_jobs, cancel_jobs

    folder, config = open_run(args.run_folder, complete=False)
    jobs = sorted((state.job_id for state in active_jobs(folder)), key=int)
    cancel_jobs(jobs)
    if jobs:
        with following(config.run.access):
            events.append(folder.path, "cancelled", jobs=jobs)
    print(f"cancelled: {', '.join(jobs)}" if jobs else "nothing to cancel: no job of this run is active")
    return 0
