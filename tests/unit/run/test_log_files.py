"""Log files, read from their end."""

from pathlib import Path

from megatron_vcppo.run.log import last_lines


def test_last_lines_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("x" * 100_000 + "\none\n\ntwo\n")
    assert last_lines(path, 2) == ["one", "two"] and last_lines(tmp_path / "none") == []
