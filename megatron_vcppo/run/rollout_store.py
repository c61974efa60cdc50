"""The rollouts of an iteration on disk: ``rollouts/iter_NNNNNNN_KofM.npz``, a file per data-parallel leader.

An iteration is stored when all M files of one M are there. What the leaders had of an iteration that a stop request
interrupted is in ``partial_NNNNNNN_KofM.npz`` until the iteration is complete.

A file holds arrays (``numpy.load`` reads them, without this project): ``schema``; ``places`` [n], of each rollout in
the order of the iteration; ``prompt_ids`` and ``response_ids``, int32, and ``rollout_logprobs``, float32, of all
rollouts one after the other, with ``prompt_lengths`` and ``response_lengths`` [n]; and ``records``, all else as UTF-8
text, one JSON object per rollout and line. ``observations`` ([start, end) in the response) is there only where a tool
wrote any, ``version_changes`` only for responses during which weights were pushed, ``num_trained`` only for responses
that are continued. Runs made before schema 2 have one ``.jsonl.zst`` per iteration, which is read as well.

With routing replay the experts that engines chose (``Rollout.routed_experts`` of all rollouts, one after the other) are
in a file of their own next to it, ``.experts.npy``, with their lengths and a checksum in the first one. They are many
times larger than all else, and are removed once no resume can need them.
"""

import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED

import msgspec
import numpy as np
import xxhash

from megatron_vcppo.config import Config
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Rollout, RolloutPart
from megatron_vcppo.run import compressed
from megatron_vcppo.run.files import open_file, read_json, replacing, write_json
from megatron_vcppo.run.folder import RunFolder, iteration_name, iteration_of
from megatron_vcppo.run.log import say

_decoder = msgspec.json.Decoder(Rollout)
SCHEMA = 2
_ARRAYS = {
    "places": np.int64,
    "prompt_ids": np.int32,
    "prompt_lengths": np.int64,
    "response_ids": np.int32,
    "response_lengths": np.int64,
    "rollout_logprobs": np.float32,
    "records": np.uint8,
}
"""Name → type of the numbers in it; all have one dimension."""
_SUFFIX, _SUFFIX_BEFORE, _EXPERTS = ".npz", ".jsonl.zst", ".experts.npy"
_NAME = re.compile(r"(iter_\d{7,})_(\d+)of(\d+)(?:\.npz|\.jsonl\.zst)")
_ANY_NAME = re.compile(r"(iter_\d{7,})_\d+of(\d+)\.")
"""Also of the experts' files."""
_PARTIAL = re.compile(r"partial_(-?\d+)_\d+of\d+(?:\.npz|\.jsonl\.zst)")
Origin = dict[str, Any]
"""Dotted key → value."""
ORIGIN_NAME = "origin.json"
ORIGIN_BEFORE: Origin = {
    "prompts.mix": {},
    "prompts.template": "{prompt}",
    "prompts.system": None,
    "prompts.apply_chat_template": False,
    "prompts.chat_template_kwargs": {},
}
"""Keys that origins of earlier versions lack, with what these versions did: their rollouts stay valid."""
SET_NAME = "set.json"
"""Written last of all into the folder of a set."""


def write_rollouts(folder: Path, iteration: int, rollouts: RolloutPart, part: int = 0, num_parts: int = 1) -> Path:
    """Write one leader's part of an iteration's rollouts; replaces what an earlier attempt wrote there."""
    path = folder / f"{iteration_name(iteration)}_{part}of{num_parts}{_SUFFIX}"
    _write(path, rollouts)
    return path


def write_partial(folder: Path, iteration: int, rollouts: RolloutPart, part: int, num_parts: int) -> Path:
    """Write what one leader has of an iteration that is not complete; those not yet scored have no reward.

    iteration: negative for evaluations within a stage, which are not stored when they are complete.
    """
    path = folder / f"partial_{iteration:07d}_{part}of{num_parts}{_SUFFIX}"
    _write(path, rollouts)
    return path


def read_partial(folder: Path, iteration: int) -> list[Rollout]:
    """All that ``write_partial`` kept of an iteration, under any number of leaders, each response once."""
    paths = sorted(folder.glob(f"partial_{iteration:07d}_*"))
    found = (rollout for path in paths if _PARTIAL.fullmatch(path.name) for _, rollout in _read(path, True))
    return list({(rollout.prompt.prompt_id, rollout.sample_index): rollout for rollout in found}.values())


def drop_partial(folder: Path, iteration: int) -> None:
    """Remove what ``write_partial`` kept of an iteration."""
    for path in folder.glob(f"partial_{iteration:07d}_*"):
        path.unlink(missing_ok=True)


def partial_iterations(folder: Path) -> list[int]:
    """The iterations of which ``write_partial`` kept something."""
    return sorted({int(match[1]) for path in folder.glob("partial_*") if (match := _PARTIAL.fullmatch(path.name))})


def read_rollouts(folder: Path, iteration: int) -> list[Rollout]:
    """All rollouts of an iteration in its order, without experts. UserError if there are none."""
    return list(RolloutPart.of(_read_all(folder, iteration)).rollouts)


def read_places(
    folder: Path, iteration: int, wanted: Callable[[int, Rollout], bool] = lambda place, rollout: True
) -> RolloutPart:
    """Those of an iteration's rollouts that are ``wanted``, with their places. UserError if it is not stored."""
    return RolloutPart.of(item for item in _read_all(folder, iteration, with_experts=True) if wanted(*item))


def iterate_rollouts(folder: Path, iteration: int) -> Iterator[Rollout]:
    """All rollouts of an iteration without experts, one leader's part after the other, of which one is held in memory
    at a time."""
    return (rollout for _, rollout in _read_all(folder, iteration))


def _read_all(folder: Path, iteration: int, with_experts: bool = False) -> Iterator[tuple[int, Rollout]]:
    paths = _complete(folder).get(iteration)
    if paths is None:
        known = stored_iterations(folder)
        there = f"; there are iterations {known[0]} to {known[-1]}" if known else ""
        raise UserError(f"{folder}: no rollouts of iteration {iteration}{there}")
    for path in paths:
        yield from _read(path, with_experts)


def _write(path: Path, rollouts: RolloutPart) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for rollout in rollouts.rollouts:
        record = {**vars(rollout), "prompt": {**vars(rollout.prompt)}, "length": len(rollout.response_ids)}
        del record["prompt"]["token_ids"]
        for name in ("response_ids", "rollout_logprobs", "routed_experts"):
            del record[name]
        for name in ("observations", "version_changes", "num_trained"):  # as in files from before there were any
            if not record[name]:
                del record[name]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    prompts, responses, logprobs = (
        [rollout.prompt.token_ids for rollout in rollouts.rollouts],
        [rollout.response_ids for rollout in rollouts.rollouts],
        [rollout.rollout_logprobs for rollout in rollouts.rollouts],
    )
    experts = _write_experts(path, rollouts)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            schema=np.int64(SCHEMA),
            places=np.asarray(rollouts.places, dtype=np.int64),
            prompt_ids=_joined(prompts, np.int32),
            prompt_lengths=np.asarray([*map(len, prompts)], dtype=np.int64),
            response_ids=_joined(responses, np.int32),
            response_lengths=np.asarray([*map(len, responses)], dtype=np.int64),
            rollout_logprobs=_joined(logprobs, np.float32),
            records=np.frombuffer("".join(lines).encode(), dtype=np.uint8),
            **experts,
        )


def _write_experts(path: Path, rollouts: RolloutPart) -> dict[str, Any]:
    """Write the file of experts that belongs to ``path``; what must be in that one to find them again."""
    lengths = np.asarray([len(rollout.routed_experts) for rollout in rollouts.rollouts], dtype=np.int64)
    file_of_experts = path.with_name(path.name.removesuffix(_SUFFIX) + _EXPERTS)
    if not lengths.any():
        file_of_experts.unlink(missing_ok=True)
        return {}
    digest = xxhash.xxh3_64()
    with replacing(file_of_experts) as temporary, temporary.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (int(lengths.sum()),)}
        np.lib.format.write_array_header_1_0(file, header)
        for rollout in rollouts.rollouts:
            digest.update(rollout.routed_experts)
            file.write(rollout.routed_experts)
    return {"expert_lengths": lengths, "expert_digest": np.uint64(digest.intdigest())}


def _read_experts(path: Path, arrays: dict[str, np.ndarray]) -> Iterator[bytes]:
    """Of each rollout of the file ``path``; none if they are gone, or are those of another attempt."""
    lengths = arrays.get("expert_lengths", np.zeros(len(arrays["places"]), dtype=np.int64))
    file_of_experts = path.with_name(path.name.removesuffix(_SUFFIX) + _EXPERTS)
    try:
        open_file(file_of_experts).close()
        rows = np.load(file_of_experts, mmap_mode="r")
        is_right = len(rows) == lengths.sum() and xxhash.xxh3_64_intdigest(rows) == int(arrays["expert_digest"])
    except (OSError, EOFError, ValueError, KeyError):
        is_right = False
    for end, length in zip(lengths.cumsum().tolist(), lengths.tolist(), strict=True):
        yield rows[end - length : end].tobytes() if is_right else b""


def drop_experts(folder: Path, up_to: int) -> None:
    """Remove the experts, and nothing else, of the iterations up to this one."""
    for path in folder.glob(f"iter_*{_EXPERTS}"):
        match = _ANY_NAME.match(path.name)
        if match and (iteration := iteration_of(match[1])) is not None and iteration <= up_to:
            path.unlink(missing_ok=True)


def _joined(rows: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=dtype) for row in rows] or [np.zeros(0, dtype)])


def _read(path: Path, with_experts: bool = False) -> Iterator[tuple[int, Rollout]]:
    """(place, rollout) of one file of any schema. UserError for one that is damaged, or newer than this code."""
    try:
        yield from _read_file(path, with_experts)
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and msgspec raise many kinds; each means that the file is damaged
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: damaged: {what}") from None


def _read_file(path: Path, with_experts: bool) -> Iterator[tuple[int, Rollout]]:
    if path.name.endswith(_SUFFIX_BEFORE):
        with compressed.open_file(path) as (file, _):
            yield from enumerate(map(_decoder.decode, compressed.read_lines(path, file)))
        return
    arrays = _read_arrays(path)
    prompt_ends, response_ends = (arrays[f"{name}_lengths"].cumsum().tolist() for name in ("prompt", "response"))
    lines = arrays["records"].tobytes().decode().split("\n")
    start = prompt_start = 0
    places = arrays["places"].tolist()
    if len(lines) != len(places) + 1:
        raise ValueError(f"{len(lines) - 1} records of {len(places)} rollouts")
    experts = _read_experts(path, arrays) if with_experts else (b"" for _ in places)
    for place, line, prompt_end, end, routed in zip(places, lines, prompt_ends, response_ends, experts, strict=False):
        record = json.loads(line)
        record |= {"response_ids": (), "rollout_logprobs": (), "prompt": {**record["prompt"], "token_ids": ()}}
        rollout = msgspec.convert(record, Rollout)
        yield (
            place,
            replace(
                rollout,
                prompt=replace(rollout.prompt, token_ids=tuple(arrays["prompt_ids"][prompt_start:prompt_end].tolist())),
                response_ids=array("i", arrays["response_ids"][start:end].tobytes()),
                rollout_logprobs=array("f", arrays["rollout_logprobs"][start:end].tobytes()),
                routed_experts=routed,
            ),
        )
        start, prompt_start = end, prompt_end


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, which fit together. ValueError or others if they do not, UserError for another schema."""
    with open_file(path) as file, np.load(file, allow_pickle=False) as content:
        if any(member.compress_type != ZIP_STORED for member in content.zip.infolist()):
            raise ValueError("it is compressed, which no file of rollouts is")
        if (schema := int(content["schema"])) != SCHEMA:
            raise UserError(f"{path}: rollouts of schema {schema}; this version reads {SCHEMA}: update it")
        arrays = {name: content[name] for name in content.files if name != "schema"}
    numbers_of = _ARRAYS | ({"expert_lengths": np.int64} if "expert_lengths" in arrays else {})
    for name, kind in numbers_of.items():
        if arrays[name].ndim != 1 or arrays[name].dtype != kind:
            raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}, not {np.dtype(kind)} [n]")
    places = arrays["places"]
    if places.size and places.min() < 0:
        raise ValueError("places below 0")
    for lengths, tokens in (("prompt_lengths", "prompt_ids"), ("response_lengths", "response_ids")):
        counts = arrays[lengths]
        fits = len(counts) == len(places) and all(0 <= count <= len(arrays[tokens]) for count in counts.tolist())
        if not fits or counts.sum() != len(arrays[tokens]):
            raise ValueError(f"{lengths} do not fit {len(places)} rollouts with {len(arrays[tokens])} {tokens}")
    if len(arrays["rollout_logprobs"]) != len(arrays["response_ids"]):
        raise ValueError(f"{len(arrays['rollout_logprobs'])} log-probs of {len(arrays['response_ids'])} tokens")
    return arrays


def drop_rollouts(folder: Path, iteration: int) -> None:
    """Remove an iteration's rollouts, complete or not."""
    for path in folder.glob(f"{iteration_name(iteration)}_*"):
        path.unlink(missing_ok=True)


def keep_as_partial(folder: Path, iteration: int) -> None:
    """Make parts of an iteration that is not complete what ``read_partial`` finds: a kill came while it was stored."""
    name = iteration_name(iteration)
    for path in folder.glob(f"{name}_*"):
        path.replace(path.with_name(f"partial_{iteration:07d}{path.name.removeprefix(name)}"))


def drop_other_parts(folder: Path, iteration: int, num_parts: int) -> None:
    """Remove the files that an attempt with another number of leaders left of an iteration."""
    for path in folder.glob(f"{iteration_name(iteration)}_*"):
        if (match := _ANY_NAME.match(path.name)) and int(match[2]) != num_parts:
            path.unlink(missing_ok=True)


def stored_iterations(folder: Path) -> list[int]:
    """The iterations of which every part is stored, in order."""
    return sorted(_complete(folder))


def _complete(folder: Path) -> dict[int, list[Path]]:
    """The files of each iteration that is stored whole, by part."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for path in folder.glob("iter_*"):
        if (match := _NAME.fullmatch(path.name)) and (iteration := iteration_of(match[1])) is not None:
            found.setdefault((iteration, int(match[3])), {})[int(match[2])] = path
    return {
        iteration: [parts[k] for k in range(num_parts)]
        for (iteration, num_parts), parts in sorted(found.items())
        if parts.keys() >= set(range(num_parts))
    }


def origin_differences(folder: Path, made: Origin) -> list[str]:
    """The keys in which what made a folder's rollouts differs; empty if nothing is recorded.

    A key that the record lacks is newer than it: what made the rollouts did as ORIGIN_BEFORE says, or else as the key's
    default does.
    """
    try:
        known = _flat(ORIGIN_BEFORE | dict(read_json(folder / ORIGIN_NAME)))
    except (FileNotFoundError, ValueError, TypeError):
        return []
    wanted = _flat(json.loads(json.dumps(made)))
    return [key for key, value in wanted.items() if known.get(key, _default(key)) != value]


def _flat(origin: Origin) -> Origin:
    """With the keys of ``ppo`` and its sections one by one, so that a new key is told from another value."""
    flat: Origin = {}
    for key, value in origin.items():
        is_section = key.startswith("ppo.") and isinstance(value, dict)
        flat |= _flat({f"{key}.{name}": inner for name, inner in value.items()}) if is_section else {key: value}
    return flat


def _default(key: str) -> Any:
    """Of a key of the configuration; None for what is none."""
    found: Any = Config()
    for name in key.split("."):
        found = getattr(found, name, None)
    return json.loads(json.dumps(asdict(found) if is_dataclass(found) and not isinstance(found, type) else found))


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
            made = read_json(self.folder / SET_NAME)["num_rollouts"]
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
