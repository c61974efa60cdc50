"""Copying rows between matrices that are stored in files, in buckets, by several threads. Knows bytes only, no models.

Rows of a matrix are contiguous in its file. A job reads or writes a range of rows of one wide matrix; the other side
is a set of narrow matrices, each with a range of the wide matrix's byte columns (the shards of tensor parallelism).
Whatever the model's size, a thread holds two buckets: a fresh page costs more than the copy, so buckets are reused.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_vcppo.errors import UserError

BUCKET_BYTES = 8 << 20
NUM_THREADS = min(8, max(2, os.cpu_count() or 1))

Convert = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Matrix:
    """Row i is the ``row_bytes`` bytes of ``path`` from ``offset + i * row_bytes`` on."""

    path: Path
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class Strip:
    """Byte columns [column, column + matrix.row_bytes) of a job's rows are the rows of ``matrix`` from ``row`` on."""

    matrix: Matrix
    row: int
    column: int


@dataclass(frozen=True)
class Job:
    """``num_rows`` rows from ``row`` of ``wide`` on, and the strips that together hold the same bytes."""

    wide: Matrix
    row: int
    num_rows: int
    strips: tuple[Strip, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the wide side."""
        return self.num_rows * self.wide.row_bytes

    def buckets(self) -> Iterator["Job"]:
        """The same copy as jobs of at most BUCKET_BYTES (at least one row)."""
        longest = max(self.wide.row_bytes, sum(strip.matrix.row_bytes for strip in self.strips))
        step = max(1, BUCKET_BYTES // longest)
        for start in range(0, self.num_rows, step):
            strips = tuple(replace(strip, row=strip.row + start) for strip in self.strips)
            yield Job(self.wide, self.row + start, min(step, self.num_rows - start), strips)


def scatter(jobs: Iterable[Job], total_bytes: int, progress: Progress | None = None) -> None:
    """Copy each job's wide rows to its strips."""

    def work(job: Job, files: _Files, first: np.ndarray, second: np.ndarray) -> None:
        rows = first[: job.num_bytes]
        files.read(job.wide.path, job.wide.offset + job.row * job.wide.row_bytes, rows)
        table = rows.reshape(job.num_rows, job.wide.row_bytes)
        for strip in job.strips:
            width = strip.matrix.row_bytes
            piece = rows
            if width != job.wide.row_bytes:
                piece = second[: job.num_rows * width]
                np.copyto(piece.reshape(job.num_rows, width), table[:, strip.column : strip.column + width])
            files.write(strip.matrix.path, strip.matrix.offset + strip.row * width, piece)

    _run(jobs, total_bytes, work, progress)


def gather(
    jobs: Iterable[Job], total_bytes: int, progress: Progress | None = None, convert: Convert | None = None
) -> None:
    """Copy each job's strips to its wide rows; ``convert`` maps the rows' bytes to those that are written."""

    def work(job: Job, files: _Files, first: np.ndarray, second: np.ndarray) -> None:
        source_row_bytes = sum(strip.matrix.row_bytes for strip in job.strips)
        rows = first[: job.num_rows * source_row_bytes]
        table = rows.reshape(job.num_rows, source_row_bytes)
        for strip in job.strips:
            width = strip.matrix.row_bytes
            piece = rows if width == source_row_bytes else second[: job.num_rows * width]
            files.read(strip.matrix.path, strip.matrix.offset + strip.row * width, piece)
            if piece is not rows:
                np.copyto(table[:, strip.column : strip.column + width], piece.reshape(job.num_rows, width))
        out = convert(rows) if convert else rows
        files.write(job.wide.path, job.wide.offset + job.row * job.wide.row_bytes, out)

    _run(jobs, total_bytes, work, progress)


def allocate(path: Path, num_bytes: int) -> None:
    """Make a file of this size, to be filled by jobs."""
    with open(path, "xb") as stream:
        stream.truncate(num_bytes)


class _Files:
    """Open descriptors by path, shared by the threads."""

    def __init__(self) -> None:
        self._descriptors: dict[tuple[Path, int], int] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, into: np.ndarray) -> None:
        descriptor, view = self._open(path, os.O_RDONLY), into.data
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise UserError(f"{path}: truncated: ends before byte {offset + len(view)}")
            view, offset = view[count:], offset + count

    def write(self, path: Path, offset: int, data: np.ndarray) -> None:
        descriptor, view = self._open(path, os.O_WRONLY), data.data
        while view:
            count = os.pwritev(descriptor, [view], offset)
            view, offset = view[count:], offset + count

    def _open(self, path: Path, flags: int) -> int:
        with self._lock:
            key = (path, flags)
            if key not in self._descriptors:
                self._descriptors[key] = os.open(path, flags)
            return self._descriptors[key]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@contextmanager
def _open_files() -> Iterator[_Files]:
    files = _Files()
    try:
        yield files
    finally:
        files.close()


def _run(
    jobs: Iterable[Job],
    total_bytes: int,
    work: Callable[[Job, _Files, np.ndarray, np.ndarray], None],
    progress: Progress | None,
) -> None:
    local = threading.local()
    done_bytes = 0

    def task(bucket: Job, files: _Files) -> int:
        longest = max(bucket.wide.row_bytes, sum(strip.matrix.row_bytes for strip in bucket.strips))
        needed = longest * bucket.num_rows
        if not hasattr(local, "buffers") or len(local.buffers[0]) < needed:
            local.buffers = tuple(np.empty(max(needed, BUCKET_BYTES), np.uint8) for _ in range(2))
        work(bucket, files, *local.buffers)
        return bucket.num_bytes

    with _open_files() as files, ThreadPoolExecutor(NUM_THREADS) as pool:
        pending: set[Future[int]] = set()
        try:
            for job in jobs:
                for bucket in job.buckets():
                    pending.add(pool.submit(task, bucket, files))
                    if len(pending) >= 4 * NUM_THREADS:
                        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                        done_bytes += sum(future.result() for future in finished)
                        if progress:
                            progress(done_bytes, total_bytes)
            done_bytes += sum(future.result() for future in pending)
        finally:
            for future in pending:
                future.cancel()
    if progress:
        progress(done_bytes, total_bytes)
