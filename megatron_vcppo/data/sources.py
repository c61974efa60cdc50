"""Samples from where users keep them: JSONL and Parquet files, saved data sets, names that `datasets` knows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcppo.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One sample as it was read; ``value`` is None if it could not be, and ``problem`` says why."""

    number: int
    """Line number from 1 (JSONL) or index from 0 (data sets)."""
    value: dict[str, Any] | None
    problem: str = ""
    fraction: float = 0.0
    """How much of the source has been read with it, for progress."""


def read_samples(source: str, split: str = "train") -> Iterator[Sample]:
    """Stream the samples of a source in its order. Blank lines of a JSONL file are not samples.

    source: a .jsonl or .json (one object a line) or .parquet file; a folder written by
    ``Dataset.save_to_disk``; else ``name``, ``name:split`` or ``name:configuration:split`` for
    ``datasets.load_dataset``. Raises UserError, before the first sample, if the source cannot be opened.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        return _read_jsonl(path)
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{source}: expected a .jsonl, .json or .parquet file, or a folder of a saved data set")
    if not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute()):
        raise UserError(f"{source}: no such file or folder")
    return _read_dataset(source, split)


def sample_name(source: str, number: int) -> str:
    """Where a sample is, as users write it: file.jsonl:17 or folder[17]."""
    return f"{source}:{number}" if source.endswith((".jsonl", ".json")) else f"{source}[{number}]"


def _read_jsonl(path: Path) -> Iterator[Sample]:
    size = max(path.stat().st_size, 1)
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            done += len(line)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
                yield Sample(number, None, f"not JSON ({error})", done / size)
                continue
            if isinstance(value, dict):
                yield Sample(number, value, fraction=done / size)
            else:
                yield Sample(number, None, f"not a JSON object but a {type(value).__name__}", done / size)


def _read_dataset(source: str, split: str) -> Iterator[Sample]:
    dataset = _open_dataset(source, split)
    for number, value in enumerate(dataset):
        yield Sample(number, value, fraction=(number + 1) / len(dataset))


def _open_dataset(source: str, split: str) -> Any:
    import datasets  # slow to import, and most runs read JSONL

    path = Path(source)
    try:
        if path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        if path.is_dir():
            opened = datasets.load_from_disk(str(path))
        else:
            name, *rest = source.split(":")
            split = rest[-1] if rest else split
            return datasets.load_dataset(name, rest[0] if len(rest) > 1 else None, split=split)
    except Exception as error:  # `datasets` raises many kinds; each means that the source cannot be read
        raise UserError(f"cannot read the data set {source}: {' '.join(str(error).split())[:300]}") from error
    if isinstance(opened, datasets.DatasetDict):
        if split not in opened:
            raise UserError(f"{source} has no split {split!r}; it has {', '.join(opened)}")
        opened = opened[split]
    return opened
