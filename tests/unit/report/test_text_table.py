"""Tables as text: what a pipe gets, and what a terminal gets."""

import io
import os
import pty

from rich.cells import cell_len

from megatron_vcppo.report.text_table import styled, text_table


def test_columns_are_aligned_and_numbers_to_the_right() -> None:
    rows = [{"run": "a", "loss": 0.123456, "state": "done"}, {"run": "longer", "loss": 12, "note": "[b]kept[/b]"}]
    assert text_table(rows).splitlines() == [
        "run       loss  state  note",
        "a       0.1235  done",
        "longer      12         [b]kept[/b]",
    ]


def test_nothing_is_wrapped_shortened_or_colored_in_a_pipe(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = text_table([{"state": "failed", "note": "x" * 500, "more": "y y " * 100 + "y"}], io.StringIO())
    assert text.splitlines()[1] == f"failed  {'x' * 500}  {'y y ' * 100}y"


def test_wide_characters_take_two_columns() -> None:
    lines = text_table([{"name": "日本語", "x": "a"}, {"name": "abcdef", "x": "b"}]).splitlines()
    assert len({cell_len(line) for line in lines}) == 1


def test_what_an_encoding_lacks_is_no_error() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print(text_table([{"avg": "41.2 ± 3.1 %"}], stream), file=stream)


def test_a_terminal_gets_colors_and_its_width(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        text = text_table([{"state": "failed", "note": "x" * 60}], stream)
        word = styled("ok", stream)
    os.close(master)
    assert "\033[" in text and text.count("x") == 60 and len(text.splitlines()) > 2
    assert word.startswith("\033[") and "ok" in word
    assert styled("ok", io.StringIO()) == "ok"


def test_no_rows_are_an_empty_table() -> None:
    assert text_table([]) == ""
