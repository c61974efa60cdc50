"""vcppo clean: remove what a run can do without."""

import argparse

from megatron_vcppo.commands.arguments import add_run_argument


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "clean",
        description="List what a run can do without and what that frees: checkpoints before the one that a resume or a "
        "later stage loads, and, once the whole chain is done, rollouts. Removes nothing without --yes.",
    )
    add_run_argument(parser)
    parser.add_argument("--keep-rollouts", action="store_true", help="checkpoints only")
    parser.add_argument("--yes", action="store_true", help="remove it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List, or remove. UserError while the run is active."""
    from megatron_vcppo.commands.list_runs import size_text
    from megatron_vcppo.errors import UserError
    from megatron_vcppo.run import events
    from megatron_vcppo.run.access import following
    from megatron_vcppo.run.cleaning import clean, removable
    from megatron_vcppo.run.config_file import open_run
    from megatron_vcppo.run.log import printable
    from megatron_vcppo.slurm.submission import active_jobs

    folder, config = open_run(args.run_folder, complete=False)
    with following(config.run.access), folder.locked():
        unfinished = not all(folder.stage(stage).marked_done() for stage in config.stages)
        if unfinished and (active := active_jobs(folder)):
            jobs = ", ".join(f"{state.job_id} ({state.state})" for state in active)
            raise UserError(f"{folder.path}: this run is active, jobs {jobs}: wait for them, or vcppo cancel it first")
        found = removable(folder, config.stages, config.export.checkpoint)
        found = [item for item in found if not (args.keep_rollouts and item.what == "rollouts")]
        for item in found:
            print(printable(f"{size_text(item.num_bytes):>10}  {item.what:<14}  {item.path.relative_to(folder.path)}"))
        total = size_text(sum(item.num_bytes for item in found))
        if not found:
            print("nothing to remove")
        elif not args.yes:
            print(f"{total} in all; nothing was removed: --yes removes it")
        else:
            clean(found)
            events.append(folder.path, "cleaned", removed=[str(item.path.relative_to(folder.path)) for item in found])
            print(f"{total} freed, except where other runs have the same files (--base)")
    return 0
