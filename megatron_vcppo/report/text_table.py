"""Tables as text: colored and fitted to a terminal, plain lines in logs and pipes."""

import io
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_vcppo.run.log import printable

PIPE_WIDTH = 1_000_000
"""Characters: nothing is wrapped or shortened where a line may be searched or parsed."""
NUMBER = re.compile(r"[-+]?[.\d]")
STYLES = {
    "ok": "green",
    "done": "green",
    "running": "cyan",
    "pending": "yellow",
    "requeued": "yellow",
    "saved": "yellow",
    "cancelled": "yellow",
    "failed": "bold red",
    "damaged": "bold red",
    "FAIL": "bold red",
}
"""Word → its style on a terminal."""


def short(value: float) -> str:
    """Three digits, without a needless exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def percent_interval(share: float, half_width: float, low: float | None = None, high: float | None = None) -> str:
    """Example: (0.412, 0.031) → 41.2 ± 3.1 %; with the ends of the interval: 41.2 % (38.1 to 44.3)."""
    if low is None or high is None:
        return f"{100 * share:.1f} ± {100 * half_width:.1f} %"
    return f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def duration(seconds: float) -> str:
    """Example: 1 h 5 min."""
    if not math.isfinite(seconds):
        return f"{seconds:g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def text_table(rows: Sequence[Mapping[str, object]], stream: TextIO | None = None) -> str:
    """Rows of possibly different columns as aligned text: a line of column names, then one line per row.

    Floats get four digits; a column whose cells all begin like numbers is aligned right. stream: where the text will be
    printed. If that is a terminal, states are colored and long cells are wrapped; otherwise a row is one line.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        cells = [text for row in rows if (text := _text(row.get(column, "")))]
        numbers = all(NUMBER.match(cell) for cell in cells)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_styled(_text(row.get(column, ""))) for column in columns))
    return "\n".join(line.rstrip() for line in _render(table, stream).splitlines())


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of possibly different columns as a Markdown table; a bar in a cell is escaped."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column, "")).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *cells])


def styled(word: str, stream: TextIO) -> str:
    """A state as it looks in a table on the stream."""
    return _render(_styled(word), stream).rstrip("\n")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _styled(text: str) -> Text:
    return Text(text, STYLES.get(text, ""))


def _render(what: RenderableType, stream: TextIO | None) -> str:
    """As text for the stream; characters that its encoding lacks become question marks."""
    is_terminal = stream is not None and stream.isatty()
    text = io.StringIO()
    console = Console(
        file=text,
        force_terminal=is_terminal,
        color_system="auto" if is_terminal else None,
        width=shutil.get_terminal_size().columns if is_terminal else PIPE_WIDTH,
    )
    console.print(what)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.getvalue().encode(encoding, "replace").decode(encoding)
