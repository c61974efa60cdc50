"""What ``vcppo experiment`` reads from its runs and writes: the numbers, the page, plots, and tables in a document."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vcppo import __version__
from megatron_vcppo.commands.arguments import print_note
from megatron_vcppo.errors import DONE, UserError
from megatron_vcppo.run import events
from megatron_vcppo.run.files import read_text
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.log import printable

if TYPE_CHECKING:
    from megatron_vcppo.launch.experiment_file import Experiment
    from megatron_vcppo.report.experiment_results import ExperimentResults

PAGE = "report.html"


def collect_and_report(
    experiment: "Experiment",
    root: Path,
    seeds: Sequence[int],
    others: "Sequence[tuple[Path, ExperimentResults]]",
    figures: Path | None,
    into: Path | None,
) -> int:
    """Read the runs that there are, keep their numbers, draw the page. UserError if there is none."""
    from megatron_vcppo.report.experiment_results import RESULTS_NAME, joined, read_results, write_results

    folder = root / experiment.name
    kept = folder / RESULTS_NAME
    results = collect(experiment, root, seeds)
    for path, other in others:
        results = joined(results, other, path)
    write_results(kept, results, root=str(root))
    report(read_results(kept), folder / PAGE, figures, into)
    print(f"{kept}: the numbers, {kept.stat().st_size / 1000:,.0f} kB; vcppo experiment --redraw draws them again")
    return DONE


def collect(experiment: "Experiment", root: Path, seeds: Sequence[int]) -> "ExperimentResults":
    """The numbers of all runs of these seeds that have begun. UserError if none has."""
    from megatron_vcppo.report.experiment_results import ExperimentResults, ExperimentRun, arm_color, run_name
    from megatron_vcppo.report.run_data import read_run
    from megatron_vcppo.report.text_table import duration

    runs, folders = [], set[Path]()
    for arm in experiment.arms:
        for seed in seeds:
            folder = RunFolder(experiment.arm_run(root, arm, seed))
            if not folder.config.exists():
                continue
            done = frozenset(stage.name for stage in folder.stages() if stage.marked_done())
            color = arm_color(experiment.question, arm.name)
            data = read_run(folder.path, run_name(arm.name, seed), color, done)
            runs.append(ExperimentRun(arm.name, seed, data))
            folders |= {folder.path, experiment.shared_run(root, seed)}
    there = {int(name) for path in (root / experiment.name).glob("*/seed_*") if (name := path.name[5:]).isdecimal()}
    if left_out := sorted(there - set(seeds)):
        print_note(f"note: seed {left_out[0]} is there, too, and left out: see --first-seed and --seeds")
    if not runs:
        raise UserError(f"{root / experiment.name}: no run of this experiment has begun; see --dir and --seeds")
    made = {"drawn": time.strftime("%Y-%m-%d"), "version": __version__, "CPU cores": os.cpu_count() or 0}
    made["time of all stages, with their starts:"] = duration(sum(map(stage_seconds, folders)))
    return ExperimentResults(experiment.question, made, runs)


def stage_seconds(run: Path) -> float:
    """How long the attempts of a run's own stages took, together."""
    return sum(float(event.get("seconds", 0)) for event in events.read(run) if event["event"] == "attempt_end")


def report_diagnosis(experiments: "Sequence[ExperimentResults]", into: Path | None) -> None:
    """The table of the diagnosis over the runs of all of these, on the terminal and in a document."""
    from megatron_vcppo.report.experiment_diagnosis import DIAGNOSIS_NOTE, signature_rows
    from megatron_vcppo.report.experiment_page import diagnosis_block
    from megatron_vcppo.report.text_table import text_table

    runs = [run for results in experiments for run in results.runs]
    if into:
        put_into(into, "diagnosis", diagnosis_block(runs))
    rows = signature_rows(runs)
    print(text_table(rows, sys.stdout) if rows else "no run has failed, and none is healthy: nothing to judge")
    print(DIAGNOSIS_NOTE)


def put_into(document: Path, name: str, block: str) -> None:
    """Put the block between the marks of that name in a document. UserError if that cannot be done."""
    from megatron_vcppo.commands.report import write
    from megatron_vcppo.report.experiment_page import put_block

    try:
        text = put_block(read_text(document), name, block)
    except (OSError, ValueError) as error:
        raise UserError(f"--into {document}: {getattr(error, 'strerror', None) or error}") from None
    write(document, text.encode(), "--into")


def report(results: "ExperimentResults", out: Path, figures: Path | None, into: Path | None) -> None:
    """Write the page, the same as Markdown next to it, the figures, the tables of a document; print the verdicts."""
    from megatron_vcppo.commands.report import make_folder, write
    from megatron_vcppo.report.drawing import paper_files
    from megatron_vcppo.report.experiment_charts import empty_figures, experiment_charts
    from megatron_vcppo.report.experiment_page import (
        document_block,
        experiment_markdown,
        render_experiment,
        verdict_lines,
    )
    from megatron_vcppo.report.experiment_tables import arm_rows
    from megatron_vcppo.report.text_table import text_table

    if into:
        put_into(into, results.question.name, document_block(results))
    page = render_experiment(results).encode()
    write(out, page, "--out")
    if out.name == PAGE:  # next to another name may be a document of the user's
        write(out.with_suffix(".md"), experiment_markdown(results).encode(), "--out")
    if figures:
        make_folder(figures)
        document = read_text(into) if into else None
        for chart in experiment_charts(results):
            for name, content in paper_files(chart).items():
                if document is None or f"{figures.name}/{name})" in document:
                    write(figures / name, content, "--figures")
    for figure in empty_figures(results):
        print_note(f"note: nothing to draw for the figure {figure}: no run has these numbers")
    print(text_table(arm_rows(results), sys.stdout))
    for line in verdict_lines(results):
        print(printable(line))
    print(f"{out}: {len(page) / 1000:,.0f} kB")
