"""Files appear whole or not at all, and lines are read as far as they were written."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_vcppo.data import sft_dataset
from megatron_vcppo.errors import system_error
from megatron_vcppo.run import files
from megatron_vcppo.run.files import (
    append_json_line,
    make_private_folder,
    read_json_lines,
    replacing,
    write_json,
    write_text,
)


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "data"):
        sft_dataset._write_array(Path("/dev/full"), np.arange(100_000))
    named = system_error(caught.value)
    assert str(named) == f"{tmp_path / 'data'}: No space left on device: make room, then run the same command again"
    assert list(tmp_path.iterdir()) == []
    assert system_error(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None
    assert system_error(BlockingIOError(errno.EAGAIN, "again")) is None


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    write_json(path, {"step": 2})
    assert path.read_text() == '{\n "step": 2\n}' and list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_removed_by_the_next_attempt(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (tmp_path / ".data.tmp").mkdir()
    (tmp_path / ".data.tmp" / "half").touch()
    for name in ("first", "second"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [path.name for path in folder.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [folder]


def test_content_is_on_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    write_text(tmp_path / "file", "text")
    assert calls == ["sync .file.tmp", "rename to file", f"sync {tmp_path.name}"]


def test_lines_that_a_kill_tore_are_dropped_and_cost_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "torn')
    assert read_json_lines(path) == [{"n": 1}]
    append_json_line(path, {"n": 3})
    with path.open("a") as file:
        file.write('[4]\n\n{"n": 5}')
    assert read_json_lines(path) == [{"n": 1}, {"n": 3}], "neither a list, nor a line that may go on, is a record"


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for n in range(100):
        append_json_line(path, {"n": n})
    records = read_json_lines(path, last_bytes=50)
    assert 0 < len(records) < 10 and records[-1] == {"n": 99}
    assert records == [{"n": n} for n in range(100)][-len(records) :]


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write(writer: int) -> None:
        for n in range(50):
            append_json_line(path, {"writer": writer, "n": n, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = read_json_lines(path)
    assert len(records) == 200
    for writer in range(4):
        assert [record["n"] for record in records if record["writer"] == writer] == list(range(50))


def test_a_private_folder_stays_private(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir(mode=0o755)
    assert stat.S_IMODE(make_private_folder(tmp_path / "place").stat().st_mode) == 0o700


def test_a_line_that_does_not_fit_is_an_error_with_its_file(tmp_path: Path) -> None:
    """A disk with some room takes a part of it: the count of a write tells, no exception does."""
    path = tmp_path / "metrics.jsonl"
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from megatron_vcppo.run.files import append_json_line\n"
        "for number in range(9):\n"
        "    try:\n"
        "        append_json_line(Path(sys.argv[1]), {'text': 40 * 'x'})\n"
        "    except OSError as error:\n"
        "        sys.exit(f'{number} {error.filename}: {error.strerror}')\n"
    )
    found = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert found.stderr == f"1 {path}: No space left on device\n"
    assert read_json_lines(path) == [{"text": 40 * "x"}]
    append_json_line(path, {"text": "room again"})
    assert read_json_lines(path)[1:] == [{"text": "room again"}]
