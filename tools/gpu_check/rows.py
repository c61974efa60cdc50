"""What a check found: the rows of the table. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    result: str = ""
    goal: str = ""
    verdict: str = "ok"
    """ok | FAIL | skipped: WHY"""
    part: str = ""
    """Filled in by the runner."""


def at_most(what: str, value: float, limit: float, unit: str = "") -> Row:
    """A row that fails above the limit, and for NaN."""
    return Row(what, f"{value:.3g}{unit}", f"≤ {limit:g}{unit}", "ok" if value <= limit else "FAIL")


def at_least(what: str, value: float, limit: float, unit: str = "") -> Row:
    """A row that fails below the limit, and for NaN."""
    return Row(what, f"{value:.3g}{unit}", f"≥ {limit:g}{unit}", "ok" if value >= limit else "FAIL")


def skipped(what: str, why: str) -> Row:
    """A row of what could not be checked here."""
    return Row(what, verdict=f"skipped: {why}")


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text, under a head."""
    lines = [("part", "what", "result", "goal", "verdict")]
    lines += [(row.part, row.what, row.result, row.goal, row.verdict) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    cells = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)) for line in lines]
    return "\n".join(f"{cell}  {line[4]}".rstrip() for cell, line in zip(cells, lines, strict=True))
