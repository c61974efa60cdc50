"""Samples from where users keep them: JSON and Parquet files, saved data sets, names that `datasets` knows."""

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vcppo.data.hub import hub_answers, open_hub_dataset
from megatron_vcppo.data.named_sources import NamedSource, benchmark_row, made_rows, named_source
from megatron_vcppo.errors import UserError
from megatron_vcppo.run.compressed import SUFFIXES, open_file, read_lines

Row = dict[str, Any] | list[Any]
"""An object with named fields, or a list of objects, as Open-Reasoner-Zero publishes its problems."""

_JSON = (".jsonl", ".json")
_PEEK = 4096  # bytes
_LARGEST_ARRAY = 1 << 30  # bytes of a file that is one JSON array, unpacked
_LARGEST_FIELD = 1 << 30  # characters of a CSV file's cell
DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Sample:
    """One sample as it was read; ``value`` is None if it could not be, and ``problem`` says why."""

    number: int
    """Line or place in a JSON array, from 1 (JSON files), or index from 0 (data sets)."""
    value: Row | None
    problem: str = ""
    fraction: float = 0.0
    """How much of the source has been read with it, for progress."""


def read_samples(source: str) -> Iterator[Sample]:
    """Stream the samples of a source in its order. Blank lines of a JSONL file are not samples.

    source: a .jsonl file (a sample a line), a .json file (the same, or one array of samples), either of them also as
    .gz or .zst, a .csv file (with a header) or a .parquet file; ``folder`` or ``folder:split`` of a data set, as
    ``save_to_disk`` writes it or as it is downloaded; problems by name (data/named_sources.py); else ``name``,
    ``name:split`` or ``name:configuration:split`` for ``load_dataset`` of `datasets`; default: the split train.

    Raises UserError, before the first sample, if the source cannot be opened.
    """
    if named := named_source(source):
        return _read_named(named)
    path = Path(source)
    if path.is_file() and _is_json(source):
        return _read_json(path)
    if path.is_file() and path.suffix == ".csv":
        return _read_csv(path)
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(
            f"{source}: expected a .jsonl, .json (also .gz or .zst), .csv or .parquet file, or a folder of a saved "
            "data set"
        )
    if not _place(source)[0].exists() and is_path(source):
        raise UserError(f"{source}: no such file or folder")
    return _read_dataset(source)


def is_path(source: str) -> bool:
    """Whether a source is written as a file or folder, not as the name of a data set."""
    return _is_json(source) or source.endswith((".csv", ".parquet")) or source.startswith(("/", ".", "~"))


def check_source(source: str) -> None:
    """Raise UserError if a source is not there: a missing file or folder, or a data set that nobody can load now.

    A data set that the hub can be asked for is not loaded: the machine that checks may not be the one that reads.
    """
    path = _place(source)[0]
    if path.exists():
        return
    if is_path(source):
        raise UserError(f"{source} does not exist")
    if not hub_answers():
        open_hub_dataset(source, DEFAULT_SPLIT)


def sample_name(source: str, number: int) -> str:
    """Where a sample is, as users write it: file.jsonl:17 or folder[17]."""
    return f"{source}:{number}" if _is_json(source) else f"{source}[{number}]"


def _is_json(source: str) -> bool:
    return _plain(source).suffix in _JSON


def _plain(source: str | Path) -> Path:
    """The path without the ending of a compression."""
    path = Path(source)
    return path.with_suffix("") if path.suffix in SUFFIXES else path


def _read_json(path: Path) -> Iterator[Sample]:
    if _plain(path).suffix == ".json" and (array := _array(path)) is not None:
        for number, value in enumerate(array, start=1):
            yield Sample(number, *_checked(value, is_text=False), number / len(array))
        return
    size = max(path.stat().st_size, 1)
    with open_file(path) as (file, raw):
        for number, line in enumerate(read_lines(path, file), start=1):
            if line.strip():
                yield Sample(number, *_parse(line), raw.tell() / size)


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


def _array(path: Path) -> list[Any] | None:
    """The items of a file that is one JSON array; None if it is anything else, such as a sample a line."""
    with open_file(path) as (file, _):
        text = file.read(_PEEK)
        if not text.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return None
        text += file.read(_LARGEST_ARRAY)
        if len(text) > _LARGEST_ARRAY:
            raise UserError(f"{path}: a JSON array of more than {_LARGEST_ARRAY >> 30} GiB: write it as .jsonl")
        try:
            found = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, list) else None


def _parse(line: bytes) -> tuple[Row | None, str]:
    """The sample on a line, or what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError or UnicodeDecodeError; nested thousands deep
        return None, f"not JSON ({error})"
    return _checked(value, is_text=b"\\ud" not in line.lower())


def _checked(value: Any, is_text: bool) -> tuple[Row | None, str]:
    """A parsed sample, or what is wrong with it. is_text: it is known to hold no half of an escaped pair."""
    if not is_text:
        try:
            # Cutting a text may leave half of a pair: JSON allows it, but no tokenizer takes it.
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return None, f"not text ({error.reason})"
    if isinstance(value, dict) or (isinstance(value, list) and value and all(isinstance(v, dict) for v in value)):
        return value, ""
    return None, f"not a JSON object but a {type(value).__name__}"


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
    path, split = _place(source)
    if not path.exists():
        return open_hub_dataset(source, split)
    import datasets  # slow to import, and most runs read JSONL

    try:
        if path.is_file():
            return datasets.Dataset.from_parquet(str(path))
        saved = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME)
        if not any((path / name).exists() for name in saved):
            return datasets.load_dataset(str(path), split=split)
        opened = datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` raises many kinds; each means that the source cannot be read
        raise UserError(f"cannot read the data set {source}: {' '.join(str(error).split())[:300]}") from error
    if isinstance(opened, datasets.DatasetDict):
        if split not in opened:
            raise UserError(f"{source} has no split {split!r}; it has {', '.join(opened)}")
        opened = opened[split]
    return opened
