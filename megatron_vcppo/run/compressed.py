"""Files that may be compressed, read as what they hold; a damaged or truncated one is an error, never shorter data.

What a small file unpacks to has no limit: no more than a line is in memory at a time, and lines have one.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from megatron_vcppo.errors import UserError
from megatron_vcppo.run import files

SUFFIXES = (".gz", ".zst")
LONGEST_LINE_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 20
_PACKED_BYTES = 1 << 11
"""Of a .zst file at a time: 4 bytes of it may hold 128 KiB, so these unpack to 64 MiB at most."""


@contextmanager
def open_file(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, and the file itself, whose position tells the progress.

    Raises UserError, while it is read, if a .gz or .zst file cannot be decompressed.
    """
    with files.open_file(path) as raw:
        try:
            if path.suffix == ".gz":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)), raw
            elif path.suffix == ".zst":
                yield cast(IO[bytes], io.BufferedReader(_Chunks(_zstd_chunks(raw)), _CHUNK_BYTES)), raw
            else:
                yield raw, raw
        except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
            raise UserError(f"{path}: cannot be decompressed: {error}") from None


def read_lines(path: Path, file: IO[bytes], largest_bytes: int | None = None) -> Iterator[bytes]:
    """The lines of what ``open_file`` gave for ``path``.

    Raises UserError for a line of more than LONGEST_LINE_BYTES, or once all are more than ``largest_bytes`` together.
    """
    number = total = 0
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        total += len(line)
        if len(line) > LONGEST_LINE_BYTES:
            raise UserError(f"{path}:{number}: a line of more than {LONGEST_LINE_BYTES >> 20} MiB")
        if largest_bytes is not None and total > largest_bytes:
            raise UserError(f"{path}: unpacks to more than {largest_bytes >> 20} MiB")
        yield line


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """zstandard's own readers end silently where a file is truncated, and after the first of several frames."""
    frame: Any = None
    while chunk := raw.read(_PACKED_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends within a frame")


class _Chunks(io.RawIOBase):
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            found = next(self._chunks, None)
            if found is None:
                return 0
            self._rest = memoryview(found)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
