"""Files that may be compressed, read as what they hold; a damaged or truncated one is an error, never shorter data."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from megatron_vcppo.errors import UserError

SUFFIXES = (".gz", ".zst")
_CHUNK_BYTES = 1 << 20


@contextmanager
def open_file(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, and the file itself, whose position tells the progress.

    Raises UserError, while it is read, if a .gz or .zst file cannot be decompressed.
    """
    with path.open("rb") as raw:
        try:
            if path.suffix == ".gz":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)), raw
            elif path.suffix == ".zst":
                yield cast(IO[bytes], io.BufferedReader(_Chunks(_zstd_chunks(raw)), _CHUNK_BYTES)), raw
            else:
                yield raw, raw
        except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
            raise UserError(f"{path}: cannot be decompressed: {error}") from None


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    """zstandard's own readers end silently where a file is truncated, and after the first of several frames."""
    frame: Any = None
    while chunk := raw.read(_CHUNK_BYTES):
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
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            found = next(self._chunks, None)
            if found is None:
                return 0
            self._rest = found
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
