"""``vcppo report RUN …``: curves, diagnosis and sample rollouts of a run, or of several, as one HTML page."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_vcppo.config.sections.run import Access
from megatron_vcppo.errors import UserError, storage_error
from megatron_vcppo.run.log import printable

if TYPE_CHECKING:
    from megatron_vcppo.report.run_data import RunData
    from megatron_vcppo.report.samples import Samples


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        description="Write one self-contained HTML page about a run, also while it is running: stages, diagnosis, "
        "evaluation, curves, advantages by position, time per phase, sample rollouts, configuration. Several runs "
        "share the same charts.",
    )
    parser.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html, or comparison.html, in the first RUN"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write each chart to DIR for a paper, as SVG and PDF"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, draw, write, print where and what was diagnosed."""
    runs = read_runs(args.run_folders)
    from megatron_vcppo.report.page import render  # matplotlib: after the user's mistakes
    from megatron_vcppo.run.access import following

    if args.figures:
        make_folder(args.figures)
    out = args.out or args.run_folders[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    page = render(runs, written_at=time.strftime("%Y-%m-%d %H:%M")).encode()
    with following("as_is" if args.out else access_of(args.run_folders[0])):
        write(out, page, "--out")
    print(printable(f"{out}: {len(page) / 1000:,.0f} kB"))
    if args.figures:
        print(printable(f"{args.figures}: {write_figures(args.figures, runs)} charts, each as SVG and PDF"))
    for one in runs:
        for finding in one.findings() if "ppo" in one.history else ():
            if finding.state == "found":
                print(f"{one.name}: {finding.signature}: {finding.evidence}")
    return 0


def access_of(folder: Path) -> Access:
    """Who may read what is written into the run, which may be from elsewhere."""
    from megatron_vcppo.report.run_data import read_config

    section = read_config(folder).get("run")
    access = section.get("access") if isinstance(section, dict) else None
    return next((known for known in get_args(Access) if known == access), "as_is")


def read_runs(folders: Sequence[Path]) -> "list[RunData]":
    """The runs, each with its own name and color. UserError if a folder is no run or is named twice."""
    from megatron_vcppo.report.run_data import COLORS, read_config, read_run
    from megatron_vcppo.run.folder import RunFolder

    for folder in folders:
        read_config(folder)  # every mistake in the call before any work
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"the same run is named twice: {' '.join(map(str, folders))}")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = []
    for i, (folder, name) in enumerate(zip(folders, map(printable, names))):
        done = frozenset(stage.name for stage in RunFolder(folder).stages() if stage.marked_done())
        runs.append(read_run(folder, name, COLORS[i % len(COLORS)], done, samples_of(folder)))
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


def make_folder(folder: Path) -> None:
    """Make the folder of --figures. UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make: {error.strerror}; choose another place with --figures") from None


def write_figures(folder: Path, runs: "Sequence[RunData]") -> int:
    """Write every chart's files into a folder; returns how many charts there are."""
    from megatron_vcppo.report.drawing import paper_files
    from megatron_vcppo.report.run_charts import charts_of

    charts = charts_of(runs)
    for chart in charts:
        for name, content in paper_files(chart).items():
            write(folder / name, content, "--figures")
    return len(charts)


def write(out: Path, content: bytes, option: str) -> None:
    """The file appears whole or not at all. UserError if it cannot be written; it names the option that says where."""
    from megatron_vcppo.run.files import write_bytes

    try:
        write_bytes(out, content)
    except OSError as error:
        if found := storage_error(error, str(out), "run the same command again"):
            raise found from None
        raise UserError(f"{out}: cannot write: {error.strerror}; choose another place with {option}") from None
