"""The report of an experiment: one self-contained HTML page, the same tables as Markdown, and the block of a document
that has the results of several experiments."""

from collections.abc import Sequence
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.report.experiment_charts import experiment_charts
from megatron_vcppo.report.experiment_diagnosis import DIAGNOSIS_NOTE, distinct, signature_rows
from megatron_vcppo.report.experiment_results import ExperimentResults, ExperimentRun
from megatron_vcppo.report.experiment_tables import (
    RULE,
    arm_rows,
    difference_rows,
    judged_claims,
    seed_rows,
    summary_lines,
)
from megatron_vcppo.report.page import template
from megatron_vcppo.report.text_table import duration, markdown_table

BADGES = {"supported": "done", "contrary": "found", "not supported": "running", "not judged": "waiting"}
"""Verdict → CSS class."""


def render_experiment(results: ExperimentResults) -> str:
    """The page as HTML; a function of the results alone."""
    return str(
        template("experiment.html.jinja").render(
            question=results.question,
            several=False,
            made=made_text(results),
            claims=judged_claims(results),
            badges=BADGES,
            rule=RULE,
            arms=arm_rows(results),
            differences=difference_rows(results),
            charts=experiment_charts(results),
            signatures=signature_rows(results.runs),
            diagnosis_note=DIAGNOSIS_NOTE,
            seeds=seed_rows(results),
        )
    )


def experiment_markdown(results: ExperimentResults) -> str:
    """Verdicts and tables, for a document."""
    question = results.question
    parts = [f"# {question.title}", question.question, question.shared, made_text(results)]
    if question.claims:
        parts += ["## Verdict", markdown_table(verdict_rows(results)), RULE]
    parts += ["## Arms", "Mean ± standard error over seeds.", markdown_table(arm_rows(results))]
    if differences := difference_rows(results):
        parts += ["## Differences by seed", markdown_table(differences)]
    if signatures := signature_rows(results.runs):
        parts += ["## Diagnosis", DIAGNOSIS_NOTE, markdown_table(signatures)]
    parts += ["## Runs", markdown_table(seed_rows(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_rows(results: ExperimentResults) -> list[dict[str, Any]]:
    """One row per claim."""
    return [
        {"claim": claim.text, "at this scale": claim.verdict, "numbers": claim.numbers}
        for claim in judged_claims(results)
    ]


def document_block(results: ExperimentResults) -> str:
    """What a document with a section per experiment shows: the tables, without what all sections have in common."""
    question = results.question
    parts = [f"{made_text(results)}. {question.shared}"]
    if question.claims:
        parts += [markdown_table(verdict_rows(results))]
    parts += ["Arms, mean ± standard error over seeds:", markdown_table(arm_rows(results))]
    if differences := difference_rows(results):
        parts += ["Differences by seed, mean ± standard error:", markdown_table(differences)]
    if signatures := signature_rows(results.runs):
        parts += ["The diagnosis over these runs:", markdown_table(signatures)]
    return "\n\n".join(parts) + "\n"


def diagnosis_block(runs: Sequence[ExperimentRun]) -> str:
    """The same for the diagnosis over the runs of several experiments."""
    rows = signature_rows(runs)
    text = f"{len(distinct(runs))} runs. {DIAGNOSIS_NOTE}\n\n{markdown_table(rows)}" if rows else "No run to judge."
    return f"{text}\n"


def put_block(document: str, name: str, block: str) -> str:
    """The document with the block between the two marks of that name. UserError if it does not have them."""
    first, last = f"<!-- results of {name} -->\n", f"<!-- end of {name} -->"
    before, start, rest = document.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        raise UserError(f"no place for the results of {name}: it is between the lines {first.strip()} and {last}")
    return f"{before}{first}{block}{last}{after}"


def made_text(results: ExperimentResults) -> str:
    """How many runs, how long they took, where and when. Example: 6 runs, 1 h 5 min of logged steps; 2026-11-27."""
    made = ", ".join(f"{name} {value}" for name, value in results.made.items())
    count = "1 run" if len(results.runs) == 1 else f"{len(results.runs)} runs"
    return f"{count}, {duration(results.seconds())} of logged steps; {made}"


def verdict_lines(results: ExperimentResults) -> list[str]:
    """What the command prints."""
    return summary_lines(judged_claims(results))
