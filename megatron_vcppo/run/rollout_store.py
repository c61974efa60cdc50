"""The rollouts of an iteration on disk: ``rollouts/iter_NNNNNNN_KofM.jsonl.zst``, one record per line.

Each of the M data-parallel leaders writes its own part K. Readable without this project: ``zstdcat FILE | jq``.
What leaders had of an iteration that a stop request interrupted is in ``partial_NNNNNNN_KofM.jsonl.zst`` until the
iteration is complete.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import msgspec
import zstandard

from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Rollout

_decoder = msgspec.json.Decoder(Rollout)
_NAME = re.compile(r"iter_(\d{7})_(\d+)of(\d+)\.jsonl\.zst")
_PARTIAL = re.compile(r"partial_(-?\d+)_\d+of\d+\.jsonl\.zst")


def write_rollouts(
    folder: Path, iteration: int, rollouts: Iterable[Rollout], part: int = 0, num_parts: int = 1
) -> Path:
    """Write one leader's rollouts; the file appears whole or not at all. Replaces what an earlier attempt wrote."""
    path = folder / f"iter_{iteration:07d}_{part}of{num_parts}.jsonl.zst"
    _write(path, rollouts)
    if part == 0:  # parts of an attempt with another number of leaders
        for other in folder.glob(f"iter_{iteration:07d}_*.jsonl.zst"):
            if (match := _NAME.fullmatch(other.name)) and int(match[3]) != num_parts:
                other.unlink(missing_ok=True)
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
    """Temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("." + path.name)
    with zstandard.open(temporary, "wt", encoding="utf-8") as file:
        for rollout in rollouts:
            record = {**asdict(rollout), "length": len(rollout.response_ids)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def _read(path: Path) -> Iterator[Rollout]:
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield _decoder.decode(line)


def read_rollouts(folder: Path, iteration: int) -> list[Rollout]:
    """All rollouts of an iteration, in the order of parts. Raises UserError if none or not all parts are there."""
    return list(iterate_rollouts(folder, iteration))


def iterate_rollouts(folder: Path, iteration: int) -> Iterator[Rollout]:
    """``read_rollouts`` one by one, for iterations that are larger than memory."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob(f"iter_{iteration:07d}_*.jsonl.zst")]
    parts = sorted((int(match[2]), int(match[3]), match[0]) for match in names if match)
    if not parts:
        known = stored_iterations(folder)
        there = f"; there are iterations {known[0]} to {known[-1]}" if known else ""
        raise UserError(f"{folder}: no rollouts of iteration {iteration}{there}")
    if len(parts) != parts[0][1]:
        raise UserError(f"{folder}: iteration {iteration} has {len(parts)} of {parts[0][1]} parts; it is being written")
    for _, _, name in parts:
        yield from _read(folder / name)


def stored_iterations(folder: Path) -> list[int]:
    """The iterations of which at least one part is stored."""
    return sorted({int(match[1]) for path in folder.glob("iter_*") if (match := _NAME.fullmatch(path.name))})
