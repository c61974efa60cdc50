"""Samples from where users keep them: JSONL and Parquet files, saved data sets, names that `datasets` knows."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vcppo.data.named_sources import NamedSource, benchmark_row, made_rows, named_source
from megatron_vcppo.errors import UserError

_LARGEST_FIELD = 1 << 30  # characters of a CSV file's cell
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Sample:
    """One sample as it was read; ``value`` is None if it could not be, and ``problem`` says why."""

    number: int
    """Line number from 1 (JSONL) or index from 0 (data sets)."""
    value: dict[str, Any] | None
    problem: str = ""
    fraction: float = 0.0
    """How much of the source has been read with it, for progress."""


def read_samples(source: str) -> Iterator[Sample]:
    """Stream the samples of a source in its order. Blank lines of a JSONL file are not samples.

    source: a .jsonl or .json (one object a line), .csv (with a header) or .parquet file; ``folder`` or
    ``folder:split`` written by ``save_to_disk`` of `datasets`; problems by name (data/named_sources.py); else ``name``,
    ``name:split`` or ``name:configuration:split`` for its ``load_dataset``; default: the split train.

    Raises UserError, before the first sample, if the source cannot be opened.
    """
    if named := named_source(source):
        return _read_named(named)
    path = Path(source)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        return _read_jsonl(path)
    if path.is_file() and path.suffix == ".csv":
        return _read_csv(path)
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{source}: expected a .jsonl, .json, .csv or .parquet file, or a folder of a saved data set")
    if not _place(source)[0].exists() and (path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute()):
        raise UserError(f"{source}: no such file or folder")
    return _read_dataset(source)


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
            value, problem = _parse(line)
            yield Sample(number, value, problem, done / size)


def _read_csv(path: Path) -> Iterator[Sample]:
    csv.field_size_limit(_LARGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file)):
                yield Sample(number, row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as CSV in UTF-8: {error}") from None


def _read_named(source: NamedSource) -> Iterator[Sample]:
    if (rows := made_rows(source)) is not None:
        yield from (Sample(number, row) for number, row in enumerate(rows))
        return
    for sample in read_samples(source.rest):
        if sample.value is None:
            yield sample
            continue
        try:
            row = benchmark_row(source, sample.value)
        except ValueError as error:
            yield replace(sample, value=None, problem=str(error))
            continue
        if row is not None:
            yield replace(sample, value=row)


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object on a line, or what is wrong with it."""
    try:
        value = json.loads(line)
        if b"\\ud" in line.lower():
            # Half of an escaped pair, as cutting a text leaves it: JSON allows it, but no tokenizer takes it.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return None, f"not text ({error.reason})"
    except (ValueError, RecursionError) as error:  # JSONDecodeError or UnicodeDecodeError; nested thousands deep
        return None, f"not JSON ({error})"
    return (value, "") if isinstance(value, dict) else (None, f"not a JSON object but a {type(value).__name__}")


def _place(source: str) -> tuple[Path, str]:
    """The path and split of ``path`` or ``folder:split``; for anything else the path is one that does not exist."""
    folder, _, named = source.rpartition(":")
    is_named = folder and not Path(source).exists() and Path(folder).is_dir()
    return (Path(folder), named) if is_named else (Path(source), DEFAULT_SPLIT)


def _read_dataset(source: str) -> Iterator[Sample]:
    dataset = _open_dataset(source)
    for number, value in enumerate(dataset):
        yield Sample(number, value, fraction=(number + 1) / len(dataset))


def _open_dataset(source: str) -> Any:
    import datasets  # slow to import, and most runs read JSONL

    path, split = _place(source)
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
