"""Progress in a log file and on a terminal."""

import contextlib
import io
import itertools
import os
import pty

from megatron_vcppo.run.progress import Progress


def test_a_log_file_gets_few_lines_with_rate_and_eta() -> None:
    stream, seconds = io.StringIO(), itertools.count(start=100, step=2)
    with Progress("sft", 40, start=20, unit="tok", stream=stream, clock=lambda: next(seconds)) as progress:
        for position in range(21, 41):
            progress.update(position, 1000, {"loss": 1.2345, "lr": 1e-6})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4, "every ten seconds, a step takes two"
    assert lines[0] == "sft 25/40 62% | 500 tok/s | ETA 00:30 | loss 1.23 lr 1.0e-06"
    assert lines[-1] == "sft 40/40 100% | 500 tok/s | ETA 00:00 | loss 1.23 lr 1.0e-06"


def read_to_the_end(terminal: int) -> str:
    """What was written to a terminal whose other side is closed: it comes in pieces, and the end is an error."""
    pieces = []
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 10_000):
            pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_a_terminal_gets_a_bar() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream, Progress("export", 10, unit="B", stream=stream) as progress:
        for position in (5, 10):
            progress.update(position, 100)
    text = read_to_the_end(master)
    assert "\r" in text and "10/10" in text and "B/s" in text


def test_nothing_to_do_is_no_error() -> None:
    stream = io.StringIO()
    Progress("empty", 0, stream=stream).update(0, 0)
    assert "empty 0/0 100%" in stream.getvalue()
