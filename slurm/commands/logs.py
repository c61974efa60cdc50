"""vcppo logs: what the roles of a run wrote."""

import argparse
import time
from pathlib import Path

from megatron_vcppo.errors import UserError
from slurm.logs import Follower
from slurm.prepare import add_run_argument, open_run
from slurm.run_folder import RunFolder


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "logs", description="Show the newest log of a role; its controller's with --role job."
    )
    add_run_argument(parser)
    parser.add_argument("stage", nargs="?", metavar="STAGE", help="default: the stage that was last started")
    parser.add_argument("--role", choices=("trainer", "rollout", "job"), default="trainer")
    parser.add_argument("--rank", type=int, default=0, help="rank of the trainer, node of the rollout role")
    parser.add_argument("--attempt", type=int, help="default: the newest")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as the log grows, until Ctrl-C")
    parser.set_defaults(run=run)


def find_log(run: RunFolder, stages: list[str], args: argparse.Namespace) -> Path:
    """The file that is meant. UserError names what there is."""
    if args.stage and args.stage not in stages:
        raise UserError(f"stage {args.stage!r} is not in this run: {', '.join(stages)}")
    if args.role == "job":
        from slurm.submit import submitted_jobs

        jobs = submitted_jobs(run)
        stage = args.stage or next((name for name in reversed(jobs) if run.attempts(name)), next(iter(jobs), None))
        if stage not in jobs:
            raise UserError(f"{run.path}: no job was submitted" + (f" for {stage}" if stage else ""))
        path = run.path / "slurm" / f"{jobs[stage]}_0_log.out"
    else:
        started = [name for name in stages if run.attempts(name)]
        stage = args.stage or (
            max(started, key=lambda name: run.attempts(name)[-1].stat().st_mtime) if started else None
        )
        if stage is None or not run.attempts(stage):
            raise UserError(f"{run.path}: no attempt of {stage or 'any stage'} has started; see vcppo status")
        folder = run.attempts(stage)[-1]
        if args.attempt is not None:
            folder = folder.with_name(f"attempt_{args.attempt}")
        path = folder / f"{args.role}_{args.rank}.log"
    if not path.exists():
        there = ", ".join(sorted(file.name for file in path.parent.glob("*"))) or "nothing"
        raise UserError(f"{path} does not exist; there is: {there}")
    return path


def run(args: argparse.Namespace) -> int:
    """Print the file; with -f until interrupted."""
    folder, config = open_run(args.folder)
    follower = Follower(find_log(folder, list(config.stages), args))
    try:
        while args.follow:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    follower.close()
    return 0
