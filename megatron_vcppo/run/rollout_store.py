"""The rollouts of an iteration on disk: ``rollouts/iter_NNNNNNN_0of1.jsonl.zst``, one record per line.

The main rank writes them. Readable without this project: ``zstdcat FILE | jq``. What the data-parallel leaders had of
an iteration that a stop request interrupted is in ``partial_NNNNNNN_KofM.jsonl.zst``, a file per leader, until the
iteration is complete.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Rollout
from megatron_vcppo.run.files import parse_json, replacing, write_json
from megatron_vcppo.run.folder import RunFolder, iteration_name, iteration_of
from megatron_vcppo.run.log import say

_decoder = msgspec.json.Decoder(Rollout)
_SUFFIX = ".jsonl.zst"
_NAME = re.compile(r"(iter_\d{7,})_0of1\.jsonl\.zst")
_PARTIAL = re.compile(r"partial_(-?\d+)_\d+of\d+\.jsonl\.zst")
Origin = dict[str, Any]
"""Dotted key → value."""
ORIGIN_NAME = "origin.json"
ORIGIN_BEFORE: Origin = {
    "prompts.mix": {},
    "prompts.template": "{prompt}",
    "prompts.system": None,
    "prompts.apply_chat_template": False,
    "prompts.chat_template_kwargs": {},
    "ppo.critic.moments": "keep",
}
"""Keys that origins of earlier versions lack, with what these versions did: their rollouts stay valid."""
SET_NAME = "set.json"
"""Written last of all into the folder of a set."""


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
    try:
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield _decoder.decode(line)
    except (zstandard.ZstdError, msgspec.MsgspecError, ValueError, EOFError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from None


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


def origin_differences(folder: Path, made: Origin) -> list[str]:
    """The keys in which what made a folder's rollouts differs; empty if nothing is recorded."""
    try:
        known = dict(parse_json((folder / ORIGIN_NAME).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return []
    known = ORIGIN_BEFORE | known
    return [key for key, value in json.loads(json.dumps(made)).items() if known.get(key) != value]


def claim(folder: Path, made: Origin, reached: int) -> None:
    """Record what makes the rollouts of a folder, and delete those that no longer match. Main rank only.

    Rollouts that something else made are dropped if they belong to iterations after ``reached``: an interrupted
    iteration is trained again on the responses that it had, but not on those of another policy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if different := origin_differences(folder, made):
        later = [iteration for iteration in stored_iterations(folder) if iteration > reached]
        if later:
            say(
                f"{folder}: iterations {later[0]} to {later[-1]} were generated under other settings "
                f"({', '.join(different)}): they are generated again"
            )
        for iteration in later:
            drop_rollouts(folder, iteration)
        # Negative: evaluations within a stage, of an actor that other settings may no longer lead to.
        for iteration in partial_iterations(folder):
            if iteration > reached or iteration < 0:
                drop_partial(folder, iteration)
        unmark_complete(folder)
    write_json(folder / ORIGIN_NAME, made)


@dataclass(frozen=True)
class StoredSet:
    """A folder of rollouts and how many of them a stage wants."""

    folder: Path
    num_rollouts: int
    is_own: bool
    """False: value_pretrain.stored_path names the folder, so another run may have made the set."""

    @property
    def is_complete(self) -> bool:
        """True if a set of at least ``num_rollouts`` was made here."""
        try:
            made = parse_json((self.folder / SET_NAME).read_text(encoding="utf-8"))["num_rollouts"]
            return bool(made >= self.num_rollouts)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def mark_complete(self) -> None:
        """Record that all rollouts are there."""
        write_json(self.folder / SET_NAME, {"num_rollouts": self.num_rollouts}, indent=None)


def unmark_complete(folder: Path) -> None:
    """Forget that a set was complete: some of its rollouts are gone."""
    (folder / SET_NAME).unlink(missing_ok=True)


def stored_set(config: Config, stage: str) -> StoredSet | None:
    """The set that a stage trains on; None if its rollouts are made for every step, or if it has none."""
    own = RunFolder.of(config).stage(stage).rollouts
    if stage == "reward_model":
        return StoredSet(own, config.reward_model.num_prompts * config.rollout.num_samples, True)
    settings = config.value_pretrain
    if stage == "value_pretrain" and settings.rollouts == "stored":
        folder = Path(settings.stored_path) if settings.stored_path else own
        return StoredSet(folder, settings.stored_rollouts, settings.stored_path is None)
    return None


def rollouts_folder(config: Config, stage: str) -> Path:
    """Where a stage stores what it generates."""
    found = stored_set(config, stage)
    return found.folder if found is not None else RunFolder.of(config).stage(stage).rollouts


def needs_engines(config: Config, stage: str) -> bool:
    """Whether a stage that generates has anything left to generate."""
    found = stored_set(config, stage)
    return found is None or not found.is_complete
