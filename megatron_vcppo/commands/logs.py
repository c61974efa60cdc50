"""vcppo logs: what the roles of a run wrote."""

import argparse
import sys
import time
from pathlib import Path

from megatron_vcppo.commands.arguments import add_run_argument
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.config_file import open_run
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import Follower, printable


class NotYet(UserError):
    """The log may still come; without -f a user's error."""


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
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="continue as the log grows and with later attempts, until all is done",
    )
    parser.set_defaults(run=run)


def find_log(run: RunFolder, stages: list[str], args: argparse.Namespace) -> Path:
    """The file that is meant. UserError names what there is; NotYet if nothing has started."""
    if args.stage and args.stage not in stages:
        raise UserError(f"stage {args.stage!r} is not in this run: {', '.join(stages)}")
    started = [name for name in stages if run.stage(name).attempts()]
    newest = max(started, key=lambda name: run.stage(name).attempts()[-1].stat().st_mtime, default=None)
    if args.role == "job":
        from megatron_vcppo.slurm.submission import submitted_jobs

        jobs = submitted_jobs(run)
        stage = args.stage or newest or next(iter(jobs), None)
        if stage not in jobs:
            raise UserError(f"{run.path}: no job was submitted" + (f" for {stage}" if stage else ""))
        path = run.job_log(jobs[stage])
        if not path.exists():
            raise NotYet(f"{run.path}: the job of {stage}, {jobs[stage]}, has not started; see vcppo status")
        return path
    stage = args.stage or newest
    if stage is None or not run.stage(stage).attempts():
        raise NotYet(f"{run.path}: no attempt of {stage or 'any stage'} has started; see vcppo status")
    stage_folder = run.stage(stage)
    folder = stage_folder.attempts()[-1] if args.attempt is None else stage_folder.attempt(args.attempt)
    path = folder / f"{args.role}_{args.rank}.log"
    if not path.exists():
        there = ", ".join(sorted(file.name for file in path.parent.glob("*"))) or "nothing"
        raise NotYet(f"{path} does not exist; there is: {there}")
    return path


def run(args: argparse.Namespace) -> int:
    """Print the file; with -f continue with the attempts and stages that follow, until what is meant is done."""
    folder, config = open_run(args.run_folder, complete=False)
    stages: list[str] = list(config.stages)
    if not args.follow:
        Follower(find_log(folder, stages, args)).close()
        return 0
    waiting = False
    shown: Path | None = None
    follower: Follower | None = None
    try:
        while True:
            done = all(folder.stage(stage).marked_done() for stage in ([args.stage] if args.stage else stages))
            path: Path | None
            try:
                path = find_log(folder, stages, args)
            except NotYet as error:
                if shown is None and not waiting:
                    print(printable(f"waiting: {error}"), file=sys.stderr, flush=True)
                path, waiting = shown, True
            if path is not None and path != shown:
                if follower is not None:
                    follower.close()
                print(printable(f"==> {path} <=="), flush=True)
                shown, follower = path, Follower(path)
            if done:
                break
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    if follower is not None:
        follower.close()
    return 0
