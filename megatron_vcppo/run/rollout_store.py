"""The rollouts of an iteration on disk: ``rollouts/iter_NNNNNNN_0of1.jsonl.zst``, one record per line.

The main rank writes them. Readable without this project: ``zstdcat FILE | jq``. What the data-parallel leaders had of
an iteration that a stop request interrupted is in ``partial_NNNNNNN_KofM.jsonl.zst``, a file per leader, until the
iteration is complete.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import msgspec
import zstandard

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Rollout
from megatron_vcppo.run.files import replacing
from megatron_vcppo.run.folder import iteration_name, iteration_of

_decoder = msgspec.json.Decoder(Rollout)
_SUFFIX = ".jsonl.zst"
_NAME = re.compile(r"(iter_\d{7,})_0of1\.jsonl\.zst")
_PARTIAL = re.compile(r"partial_(-?\d+)_\d+of\d+\.jsonl\.zst")


def write_rollouts(folder: Path, iteration: int, rollouts: Iterable[Rollout]) -> Path:
    """Write an iteration's rollouts; replaces what an earlier attempt wrote."""
    path = _path(folder, iteration)
    _write(path, rollouts)
    return path


def write_partial(folder: Path, iteration: int, rollouts: Iterable[Rollout], part: int, num_parts: int) -> Path:
    """Write what one leader has of an iteration that is not complete; those not yet scored have no reward.

    iteration: negative for evaluations within a stage, which are not stored when they are complete.
    """
    path = folder / f"partial_{iteration:07d}_{part}of{num_parts}.jsonl.zst"
    _write(path, rollouts)
    return path


def read_partial(folder: Path, iteration: int) -> list[Rollout]:
    """All that ``write_partial`` kept of an iteration, under any number of leaders, each response once."""
    paths = sorted(folder.glob(f"partial_{iteration:07d}_*.jsonl.zst"))
    found = (rollout for path in paths for rollout in _read(path))
    return list({(rollout.prompt.prompt_id, rollout.sample_index): rollout for rollout in found}.values())


def drop_partial(folder: Path, iteration: int) -> None:
    """Remove what ``write_partial`` kept of an iteration."""
    for path in folder.glob(f"partial_{iteration:07d}_*.jsonl.zst"):
        path.unlink(missing_ok=True)


def partial_iterations(folder: Path) -> list[int]:
    """The iterations of which ``write_partial`` kept something."""
    return sorted({int(match[1]) for path in folder.glob("partial_*") if (match := _PARTIAL.fullmatch(path.name))})


def _write(path: Path, rollouts: Iterable[Rollout]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, zstandard.open(temporary, "wt", encoding="utf-8") as file:
        for rollout in rollouts:
            record = {**asdict(rollout), "length": len(rollout.response_ids)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _read(path: Path) -> Iterator[Rollout]:
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield _decoder.decode(line)


def read_rollouts(folder: Path, iteration: int) -> list[Rollout]:
    """All rollouts of an iteration, as they were written. UserError if there are none."""
    return list(iterate_rollouts(folder, iteration))


def iterate_rollouts(folder: Path, iteration: int) -> Iterator[Rollout]:
    """``read_rollouts`` one by one, for iterations that are larger than memory."""
    path = _path(folder, iteration)
    if not path.exists():
        known = stored_iterations(folder)
        there = f"; there are iterations {known[0]} to {known[-1]}" if known else ""
        raise UserError(f"{folder}: no rollouts of iteration {iteration}{there}")
    yield from _read(path)


def drop_rollouts(folder: Path, iteration: int) -> None:
    """Remove an iteration's rollouts."""
    _path(folder, iteration).unlink(missing_ok=True)


def stored_iterations(folder: Path) -> list[int]:
    """The iterations that are stored, in order."""
    names = [match[1] for path in folder.glob(f"*{_SUFFIX}") if (match := _NAME.fullmatch(path.name))]
    return sorted(found for name in names if (found := iteration_of(name)) is not None)


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"{iteration_name(iteration)}_0of1{_SUFFIX}"
