"""Progress in a log file and on a terminal."""

import contextlib
import io
import os
import pty
import re
import time

from megatron_vcppo.run.progress import Progress


def test_a_log_file_gets_few_lines_with_rate_and_eta() -> None:
    stream = io.StringIO()
    with Progress("sft", 40, start=20, unit="tok", every_s=0.1, stream=stream) as progress:
        for position in range(21, 41):
            time.sleep(0.02)
            progress.update(position, 1000, {"loss": 1.2345, "lr": 1e-6})
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 5
    assert re.fullmatch(r"sft 2\d/40 \d+% \| [\d.]+k tok/s \| ETA 00:0\d \| loss 1\.23 lr 1\.0e-06", lines[0]), lines
    assert lines[-1].startswith("sft 40/40 100%") and "ETA 00:00" in lines[-1]
    rate = re.search(r"([\d.]+)k tok", lines[-1])
    assert rate and 10 < float(rate[1]) <= 50  # 1,000 tokens every 20 ms or more


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
