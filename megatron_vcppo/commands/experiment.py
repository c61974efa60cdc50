"""``vcppo experiment NAME``: the arms of an experiment file as chains, over several seeds, and one report."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vcppo.commands import experiment_report
from megatron_vcppo.commands.arguments import check_not_queued, checked_stages, natural, positive, prepare, print_note
from megatron_vcppo.config import Config
from megatron_vcppo.config.value_sources import local_overrides, path_override
from megatron_vcppo.errors import DONE, SAVED, UserError
from megatron_vcppo.launch.role_commands import ROLE_COMMANDS, RoleCommands
from megatron_vcppo.run.folder import InUse, RunFolder
from megatron_vcppo.run.log import printable, say

if TYPE_CHECKING:
    from megatron_vcppo.launch.experiment_file import Experiment

DEFAULT_DIR = Path("runs/experiments")
MOST_SEEDS = 1000
"""More is a slip."""


@dataclass(frozen=True)
class Chain:
    """One run of the experiment: a shared one, or an arm with a seed."""

    label: str
    run: RunFolder
    config: Config
    stages: list[str]
    """Those that it runs itself."""
    base: RunFolder | None = None
    """The shared run that it takes the stages before from."""
    is_arm: bool = True
    call: tuple[str, ...] = ()
    """Configuration and overrides, as ``vcppo run`` takes them."""
    equal: RunFolder | None = None
    """A finished run of another experiment that this one would repeat."""

    def is_done(self) -> bool:
        """Whether every stage has its manifest."""
        return all(self.run.stage(stage).marked_done() for stage in self.stages)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "experiment",
        description="Runs every arm of configs/experiments/NAME.yaml for every seed, here one after another, several "
        "at once, or as jobs of a cluster, and writes one report: curves and tables with standard errors over seeds, "
        "differences between arms, and what that says about the claims. What is done is never repeated: called again, "
        "it continues.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="in configs/experiments/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, the same in every run")
    parser.add_argument("--seeds", type=few, default=3, metavar="N", help="how many seeds (3)")
    parser.add_argument("--first-seed", type=natural, default=0, metavar="K", help="the first of them (0)")
    parser.add_argument(
        "--with",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        dest="others",
        help="kept results of other machines, or their folders: the report has those of their runs that are not here",
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR, help=f"folder of all experiments ({DEFAULT_DIR})")
    parser.add_argument(
        "--at-once",
        type=positive,
        default=1,
        metavar="N",
        help="chains on this machine, each on its share of the CPUs (1)",
    )
    parser.add_argument("--cluster", metavar="NAME", help="profile in configs/cluster/, a YAML file, or local")
    parser.add_argument("--dry-run", action="store_true", help="print the chains and check them; write nothing")
    parser.add_argument("--report", action="store_true", help="run nothing: draw what is there")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="draw kept results again, of a file or its folder")
    parser.add_argument(
        "--diagnosis", type=Path, nargs="+", metavar="FILE", help="hits and false alarms over all runs of kept results"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="page of --redraw (report.html next to the file)")
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="also write each chart to DIR, as SVG and PDF; with --into those to which the document links",
    )
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="put the tables into this document, between the experiment's marks"
    )
    parser.set_defaults(run=run)


def few(text: str) -> int:
    """The type of --seeds."""
    number = positive(text)
    if number > MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST_SEEDS}")
    return number


def run(args: argparse.Namespace) -> int:
    """Run what is missing, then report."""
    from megatron_vcppo.launch.experiment_file import find_experiment, read_experiment
    from megatron_vcppo.report.experiment_results import read_results

    if args.redraw and args.diagnosis:
        raise UserError("--redraw and --diagnosis exclude each other")
    if args.out and not args.redraw:
        raise UserError("--out is the page of --redraw; that of an experiment is in its folder: see --dir")
    if args.report and args.arms:
        raise UserError("--report draws all arms that have run: leave out --arms")
    if args.redraw:
        if args.name:
            raise UserError("--redraw draws a file of results: leave out the experiment's name")
        folder = args.redraw if args.redraw.is_dir() else args.redraw.parent
        experiment_report.report(
            read_results(args.redraw), args.out or folder / experiment_report.PAGE, args.figures, args.into
        )
        return DONE
    if args.diagnosis:
        experiment_report.report_diagnosis([read_results(path) for path in sorted(args.diagnosis)], args.into)
        return DONE
    if args.name is None:
        raise UserError("vcppo experiment needs a NAME, --redraw FILE or --diagnosis FILE")
    experiment = read_experiment(find_experiment(args.name))
    root, seeds = args.dir.absolute(), range(args.first_seed, args.first_seed + args.seeds)
    others = [(path, read_results(path)) for path in args.others]  # read before anything is trained

    def draw() -> int:
        return experiment_report.collect_and_report(experiment, root, seeds, others, args.figures, args.into)

    if args.report:
        try:
            plan(experiment, root, seeds, None, args.overrides, args.cluster)
        except UserError as error:  # the numbers are there all the same
            print_note(f"note: {error}")
        return draw()
    chains = plan(experiment, root, seeds, args.arms, args.overrides, args.cluster)
    if args.dry_run:
        print_plan(experiment, root, chains)
        return DONE
    check_at_once(args.at_once, chains)
    make_task(experiment, root)
    link_equal_runs(chains)
    for chain in chains:  # all are checked before anything is trained
        checked_stages(chain.run, chain.config, chain.stages[0], chain.stages[-1])
    code = start_all(chains, at_once=args.at_once)
    arms = [chain for chain in chains if chain.is_arm]
    if any(chain.run.stage(stage).metrics.exists() for chain in arms for stage in chain.stages):
        draw()
    return code


def plan(
    experiment: "Experiment",
    root: Path,
    seeds: Sequence[int],
    arms: Sequence[str] | None,
    overrides: Sequence[str],
    cluster: str | None,
) -> list[Chain]:
    """The chains in the order in which they are started: seed by seed, the shared stages before the arms.

    UserError for a configuration that is wrong, or if a run was begun with other settings.
    """
    from megatron_vcppo.launch.experiment_file import check_settings, check_taken, equal_run

    known = [arm.name for arm in experiment.arms]
    if unknown := [name for name in arms or () if name not in known]:
        raise UserError(f"--arms {unknown[0]}: no such arm; there are {', '.join(known)}")
    task_call(experiment, root)
    common = [*experiment.data_overrides(root), *experiment.shared_overrides]

    def prepared(label: str, folder: Path, seed: int, *more: str) -> Chain:
        given = [*common, *more, *overrides, path_override("run.dir", folder), f"run.seed={seed}"]
        try:
            run, config = prepare(experiment.config, given, cluster, note=print_note)
        except UserError as error:
            own = (*more, *experiment.overrides, *experiment.shared_overrides)
            if not any(override.partition("=")[0] in str(error) for override in own):
                raise
            raise UserError(f"{experiment.file}: {label}: {str(error).removeprefix('command line: ')}") from None
        call = (str(experiment.config), *local_overrides(cluster), *given)
        return Chain(label, run, config, [*config.stages], call=call)

    chains: list[Chain] = []
    for seed in seeds:
        needed: set[str] = set()
        of_seed = []
        for arm in experiment.arms:
            if arms and arm.name not in arms:
                continue
            label = f"{arm.name}, seed {seed}"
            chain = prepared(label, experiment.arm_run(root, arm, seed), seed, *experiment.overrides, *arm.overrides)
            taken = experiment.num_taken(arm, chain.stages)
            if taken == len(chain.stages):
                raise UserError(f"arm {arm.name}: all its stages are shared, it has none of its own")
            base = RunFolder(experiment.shared_run(root, seed)) if taken else None
            needed |= {*chain.stages[:taken]}
            check_settings(chain.run, chain.config, chain.stages)
            begins = chain.stages[:taken]
            equal = None if chain.run.path.exists() else equal_run(root, chain.run, chain.config, base, begins)
            of_seed.append(replace(chain, stages=chain.stages[taken:], base=base, equal=equal))
        stages = [stage for stage in experiment.shared_stages if stage in needed]
        folder = experiment.shared_run(root, seed)
        if stages and all(chain.run.path != folder for chain in chains):
            of_it = experiment.shared_seed(seed)
            stages_value = f"stages=[{', '.join(stages)}]"
            chain = prepared(f"shared stages, seed {of_it}", folder, of_it, stages_value)
            check_settings(chain.run, chain.config, stages)
            chains.append(replace(chain, is_arm=False))
        shared = next((chain.config for chain in chains if chain.run.path == folder), None)
        for chain in of_seed:
            if chain.base and shared:
                where = f"{experiment.file}: {chain.label}"
                check_taken(where, chain.config, shared, stages_before(chain))
        chains += of_seed
    return chains


def print_plan(experiment: "Experiment", root: Path, chains: Sequence[Chain]) -> None:
    """What would be run, where, and what is done."""
    print(printable(f"{experiment.question.title}: {len(chains)} chains below {root}"))
    if experiment.task:
        print(f"task {experiment.task}: vcppo make-task {' '.join(experiment.task_arguments)}")
    for chain in chains:
        done = [stage for stage in chain.stages if chain.run.stage(stage).marked_done()]
        state = f"; done: {', '.join(done)}" if done else ""
        takes = f"; begins with {chain.base.path.relative_to(root)}" if chain.base else ""
        if chain.equal:
            takes = f"; the same as {chain.equal.path.relative_to(root)}, which is done"
        print(f"  {chain.run.path.relative_to(root)}: {', '.join(chain.stages)}{takes}{state}")
    print("nothing was written")


def make_task(experiment: "Experiment", root: Path) -> None:
    """Make the synthetic task if it is not there. UserError if one with other settings is."""
    from megatron_vcppo.commands import make_task as command

    call = task_call(experiment, root)
    if call is None:
        return
    tasks = RunFolder(call.out.parent)
    tasks.make()
    try:
        with tasks.locked():
            command.run(call)
    except InUse:
        raise UserError(
            f"{call.out}: another vcppo experiment makes a task there: call again once it is done"
        ) from None


def task_call(experiment: "Experiment", root: Path) -> argparse.Namespace | None:
    """The call of make-task that makes the task; None if there is no task to make.

    UserError if there is one of other settings: runs that were trained on it would be continued on another.
    """
    folder = experiment.task_folder(root)
    if folder is None:
        return None
    from megatron_vcppo.commands import make_task as command

    parser = argparse.ArgumentParser(prog="vcppo")
    command.add_parser(parser.add_subparsers())
    call = parser.parse_args(["make-task", "--out", str(folder), *experiment.task_arguments])
    command.is_made(call, f"choose another --dir, or another task name in {experiment.file}")
    return call


def link_equal_runs(chains: Sequence[Chain]) -> None:
    """Have the arms that another experiment has run already point there."""
    for chain in chains:
        if chain.equal:
            folder = chain.run.path
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(os.path.relpath(chain.equal.path, folder.parent))
            say(f"experiment: {chain.label}: the same as {chain.equal.path}, which is done")


def check_at_once(at_once: int, chains: Sequence[Chain]) -> None:
    """UserError if so many chains cannot run here at once."""
    from megatron_vcppo.config.sections.cluster import LOCAL

    num_cpus = len(os.sched_getaffinity(0))
    if at_once > num_cpus:
        raise UserError(f"--at-once {at_once}: this machine has {num_cpus} CPUs, and each chain needs one of its own")
    if at_once > 1 and any(chain.config.cluster.name != LOCAL for chain in chains):
        raise UserError("--at-once is for chains on this machine: leave it out with --cluster, where Slurm decides")


def start_all(chains: Sequence[Chain], role_commands: RoleCommands = ROLE_COMMANDS, at_once: int = 1) -> int:
    """Run or queue what is not done; returns the worst exit code. A request to stop ends it after a save.

    A chain that fails does not keep the others from running, but those that begin with its stages wait.
    """
    from megatron_vcppo.config.sections.cluster import LOCAL

    if any(chain.config.cluster.name != LOCAL for chain in chains):
        return queue_all(chains)
    missing = [chain for chain in chains if not chain.is_done()]
    say(f"experiment: {len(chains)} chains, {len(chains) - len(missing)} of them done before")
    return run_in_turn(missing, role_commands) if at_once == 1 else run_side_by_side(missing, at_once)


def run_side_by_side(missing: Sequence[Chain], at_once: int) -> int:
    """Each chain as a command of its own, ``at_once`` at a time, in as far as they do not begin with one another."""
    from megatron_vcppo.launch.chains_at_once import ChainCommand, run_at_once, shares_of
    from megatron_vcppo.launch.role_commands import trainer_layout

    shares = shares_of(sorted(os.sched_getaffinity(0)), at_once)
    layouts = [trainer_layout(chain.config, stage) for chain in missing for stage in chain.stages]
    if (ranks := max((nodes * per_node for nodes, per_node in layouts), default=1)) > len(shares[0]):
        say(f"note: chains have up to {ranks} ranks on {len(shares[0])} CPUs; see parallel and overrides")
    commands = []
    for chain in missing:
        base = ("--base", str(chain.base.path), "--from", chain.stages[0]) if chain.base else ()
        command = (sys.executable, "-m", "megatron_vcppo.cli", "run", *chain.call, *base)
        commands.append(ChainCommand(chain.label, chain.run.path, command, chain.base.path if chain.base else None))
    return run_at_once(commands, shares)


def run_in_turn(missing: Sequence[Chain], role_commands: RoleCommands) -> int:
    """One chain after another, each on the whole machine."""
    from megatron_vcppo.launch.chains_at_once import INTERRUPTED, remaining
    from megatron_vcppo.launch.inherit import stages_to_take
    from megatron_vcppo.launch.local_chain import run_chain, stop_requests

    code, started, failed = DONE, time.monotonic(), set[Path]()
    with stop_requests() as requests:
        for number, chain in enumerate(missing):
            if requests["save"]:
                return code or SAVED
            to_go = remaining(started, number, len(missing))
            say(f"experiment: chain {number + 1} of {len(missing)}: {chain.label}{to_go}")
            if chain.base and chain.base.path in failed:
                say(f"experiment: {chain.label}: left out, because its shared stages failed")
                continue
            check_not_queued(chain.run)
            base = chain.base.path if chain.base else None
            taken = stages_to_take(chain.run, chain.config, base, chain.stages[0] if base else None)
            result = run_chain(chain.run, chain.config, chain.stages, role_commands, taken)
            if result in (SAVED, INTERRUPTED):
                return result
            if result != DONE:
                failed.add(chain.run.path)
                code = max(code, result)
    return code


def queue_all(chains: Sequence[Chain]) -> int:
    """Queue the chains whose first stages are there; the others once these are done, by the same command."""
    from megatron_vcppo.launch.inherit import stages_to_take
    from megatron_vcppo.slurm.slurm_cli import check_slurm_installed
    from megatron_vcppo.slurm.submission import active_jobs, resolve_python, submit

    check_slurm_installed()
    waiting = 0
    for chain in chains:
        if chain.is_done():
            continue
        if chain.run.config.exists() and active_jobs(chain.run):
            print(f"{chain.label}: queued before")
            continue
        if chain.base and not all(chain.base.stage(stage).marked_done() for stage in stages_before(chain)):
            waiting += 1
            continue
        base = chain.base.path if chain.base else None
        taken = stages_to_take(chain.run, chain.config, base, chain.stages[0] if base else None)
        jobs = submit(chain.run, chain.config, chain.stages, resolve_python(chain.config), taken)
        print(f"{chain.label}: " + ", ".join(f"{stage} {job}" for stage, job in jobs.items()))
    if waiting:
        print(f"{waiting} chains wait for their shared stages: call this again once those are done")
    return DONE


def stages_before(chain: Chain) -> list[str]:
    """The stages of the whole chain that come before its own."""
    stages: list[str] = [*chain.config.stages]
    return stages[: stages.index(chain.stages[0])]
