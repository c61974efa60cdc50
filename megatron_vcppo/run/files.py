"""How files are written and read: each appears whole or not at all, and is on disk once a call has returned.

A file or folder is made under a temporary name in the folder that it belongs to, synced, and renamed; then the folder
is synced, too, so that the name outlives a power cut. Lines of a log are appended by one write each, so that lines of
several writers do not mix, and a reader drops what a kill has torn.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from megatron_vcppo.errors import UserError

LARGEST_BYTES = 1 << 30
"""Of a file that is read as a whole."""
LONGEST_INT = 19
"""Digits, with the sign."""


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path for the caller to make a file or a folder at, which takes the place of ``path`` at the end of the block.

    On an exception it is removed, and ``path`` stays what it was. One writer at a time: the temporary name is
    ``.NAME.tmp``, so that what a kill left of an earlier attempt is removed by the next one. durable: False for what
    only passes from one process to another; it appears whole, but is not synced.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        yield temporary
        if durable:
            sync(temporary)
        if path.is_dir():
            if not temporary.is_dir():  # a wrong name must not cost a folder
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            shutil.rmtree(path)  # a rename replaces files only
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say for which file
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write or replace a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write or replace a UTF-8 file."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write or replace a JSON file."""
    write_text(path, json.dumps(value, indent=indent))


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one object to a JSONL file, in one write; a torn line before it is ended first.

    Not synced: a line that a power cut takes from a log is not worth a sync per iteration. A symbolic link is not
    followed: in a folder from elsewhere it may name any file. OSError with the path where the disk takes only a part.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = ("\n" * torn + line).encode()
        if os.write(descriptor, content) < len(content):  # what a nearly full disk takes; the next line ends it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def open_file(path: Path) -> BufferedReader:
    """A file to read that may be from elsewhere. OSError if it cannot be opened, or is a pipe, a device or a folder.

    Every file in a run, a model's folder or a checkpoint is opened here: opening a pipe waits for its writer.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ENXIO, "a pipe or a device", str(path))
    return file


def read_bytes(path: Path) -> bytes:
    """The content of a file, opened as ``open_file`` does. UserError if it is too large to be what it should be."""
    with open_file(path) as file:
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise UserError(f"{path}: larger than {LARGEST_BYTES >> 30} GiB")
    return content


def read_text(path: Path) -> str:
    """The same of a UTF-8 file. ValueError if it is none."""
    return read_bytes(path).decode()


def read_json(path: Path) -> Any:
    """What a JSON file from elsewhere holds. OSError and ValueError as of ``read_bytes`` and ``parse_json``."""
    return parse_json(read_text(path))


def read_json_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSONL file in order; none if there is no file. Lines that are torn or no objects are dropped.

    last_bytes: look only at the complete lines among this many bytes at the file's end.
    """
    try:
        with open_file(path) as file:
            start = max(0, file.seek(0, os.SEEK_END) - last_bytes) if last_bytes is not None else 0
            file.seek(start)
            lines = file.read().splitlines(keepends=True)[1 if start else 0 :]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):  # a pipe has no lines either
            return []
        raise
    return [record for line in lines if (record := parse_json_line(line)) is not None]


def parse_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What JSON text from outside holds. ValueError for what is none, or nests deeper than Python's parser can go.

    make_object: makes an object of its names and values; default: a dict, with the last value of a name.
    """
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json_line(line: bytes) -> dict[str, Any] | None:
    """The object of one line of a JSONL file, None if the line is torn or holds something else.

    A whole number that no 64 bits hold becomes a float.
    """
    try:
        record = json.loads(line, parse_int=_whole_number)
    except (ValueError, RecursionError):
        return None
    return record if line.endswith(b"\n") and isinstance(record, dict) else None


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < LONGEST_INT else float(digits)


def make_private_folder(path: Path) -> Path:
    """A folder that only this user may enter, made if it is not there."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def move(source: Path, target: Path) -> None:
    """Rename within one file system, and make the new name durable. A file that has it is replaced."""
    os.replace(source, target)
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or all files below a folder, to disk."""
    if not path.is_dir():
        _sync_file(path)
        return
    with ThreadPoolExecutor() as pool:
        list(pool.map(_sync_file, (file for file in path.rglob("*") if file.is_file())))
    for folder in (path, *(folder for folder in path.rglob("*") if folder.is_dir())):
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
