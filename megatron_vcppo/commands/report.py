"""``vcppo report RUN …``: curves, diagnosis and sample rollouts of a run, or of several side by side, as HTML."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vcppo.errors import UserError

if TYPE_CHECKING:
    from megatron_vcppo.report.run_data import RunData
    from megatron_vcppo.report.samples import Samples


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        description="Write one self-contained HTML page about a run, also while it is running: stages, diagnosis, "
        "evaluation, curves, advantages by position, time per phase, sample rollouts, configuration. Several runs "
        "share the same plots.",
    )
    parser.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="left out: report.html, or comparison.html, in the first RUN"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, render, write, say where."""
    from megatron_vcppo.report.html import render

    runs = read_runs(args.run_folders)
    out = args.out or args.run_folders[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    page = render(runs)
    write(out, page)
    print(f"{out}: {len(page.encode()) / 1000:,.0f} kB")
    for one in runs:
        for finding in one.findings() if "ppo" in one.history else ():
            if finding.state == "found":
                print(f"{one.name}: {finding.signature}: {finding.evidence}")
    return 0


def read_runs(folders: Sequence[Path]) -> "list[RunData]":
    """The runs, each with a name and a colour of its own. UserError if a folder is no run or is named twice."""
    from megatron_vcppo.report.run_data import COLOURS, read_config, read_run
    from megatron_vcppo.run.folder import RunFolder

    for folder in folders:
        read_config(folder)  # every mistake in the call before any work
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"the same run is named twice: {' '.join(map(str, folders))}")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = []
    for i, (folder, name) in enumerate(zip(folders, names)):
        done = frozenset(stage.name for stage in RunFolder(folder).stages() if stage.marked_done())
        runs.append(read_run(folder, name, COLOURS[i % len(COLOURS)], done, samples_of(folder)))
    return runs


def samples_of(folder: Path) -> "list[Samples]":
    """From the first and the last complete iteration that PPO stored; before PPO, the last of an earlier stage."""
    from megatron_vcppo.run.folder import RunFolder
    from megatron_vcppo.run.rollout_store import stored_iterations

    run = RunFolder(folder)
    ppo = run.stage("ppo").rollouts
    known = stored_iterations(ppo)
    found = [first_complete(ppo, "ppo", known), first_complete(ppo, "ppo", known[:0:-1])]
    for stage in ("value_pretrain", "reward_model"):
        if not any(found):
            rollouts = run.stage(stage).rollouts
            found.append(first_complete(rollouts, stage, stored_iterations(rollouts)[::-1]))
    return list({(one.stage, one.iteration): one for one in found if one is not None}.values())


def first_complete(rollouts: Path, stage: str, iterations: Sequence[int]) -> "Samples | None":
    """Of the first of these iterations that can be read: the newest one of a running stage may still be written."""
    from megatron_vcppo.report.samples import choose
    from megatron_vcppo.run.rollout_store import iterate_rollouts

    for iteration in iterations:
        try:
            return choose(stage, iteration, iterate_rollouts(rollouts, iteration))
        except UserError:
            continue
    return None


def write(out: Path, page: str) -> None:
    """The file appears whole or not at all. UserError if it cannot be written."""
    from megatron_vcppo.run.files import write_text

    try:
        write_text(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot write: {error.strerror}; choose another place with --out") from None
