"""The tokens of a Hugging Face folder against the rows of its model, and where its responses end. JSON only."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.run.files import read_json, write_text

_SHOWN = 5


@dataclass(frozen=True)
class Vocabulary:
    """What the tokenizer of a folder knows, as far as its files say it in JSON."""

    base: dict[str, int]
    """Token → id of the tokenizer's own vocabulary."""
    added: dict[str, int]
    """Token → id of those that were added to it."""
    eos_token: str | None

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token."""
        return None if self.eos_token is None else self.added.get(self.eos_token, self.base.get(self.eos_token))


def read_vocabulary(folder: Path) -> Vocabulary:
    """From tokenizer.json, tokenizer_config.json and added_tokens.json; what is missing or no JSON counts as empty.

    Raises UserError for JSON of another form.
    """
    files = [_read(folder / name) for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")]
    try:
        found = _vocabulary(*files)
        if not all(type(index) is int for index in (*found.base.values(), *found.added.values())):
            raise TypeError("a token's number is none")
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{folder}: malformed tokenizer files: {type(error).__name__}: {error}") from None
    return found


def _vocabulary(tokenizer: dict[str, Any], config: dict[str, Any], added: dict[str, Any]) -> Vocabulary:
    words = (tokenizer.get("model") or {}).get("vocab") or {}
    base = words if isinstance(words, dict) else {word[0]: index for index, word in enumerate(words)}
    also = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    also |= {token["content"]: int(index) for index, token in (config.get("added_tokens_decoder") or {}).items()}
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return Vocabulary(base, {word: index for word, index in (also | added).items() if base.get(word) != index}, eos)


def check_ids(folder: Path, ids: dict[str, int]) -> None:
    """Raise UserError if a token has no row in the embedding of the folder's model; nothing without a config.json.

    Such a token would be trained on rows that only pad the embedding, which no export contains.
    """
    rows = _read(folder / "config.json").get("vocab_size")
    if not isinstance(rows, int) or not ids:
        return
    outside = sorted((index, token) for token, index in ids.items() if index >= rows)
    if outside:
        names = ", ".join(f"{token!r} ({index})" for index, token in outside[:_SHOWN])
        more = ", …" if len(outside) > _SHOWN else ""
        raise UserError(
            f"{folder}: the tokenizer has tokens without a row in the embedding of {rows:,} rows (vocab_size in "
            f"config.json): {names}{more}; resize the embedding in the checkpoint, or remove the tokens"
        )


def check_vocabulary(folder: Path) -> str:
    """``check_ids`` of the folder's own files; returns a note that names added tokens, "" if there are none."""
    vocabulary = read_vocabulary(folder)
    check_ids(folder, vocabulary.base | vocabulary.added)
    if not vocabulary.added:
        return ""
    latest = sorted(vocabulary.added, key=lambda token: vocabulary.added[token])[-_SHOWN:]
    return (
        f"{folder}: {len(vocabulary.added)} tokens were added to the tokenizer's vocabulary "
        f"({'…, ' if len(vocabulary.added) > _SHOWN else ''}{', '.join(latest)}); each has its row in the embedding"
    )


def stop_ids(folder: Path) -> list[int]:
    """The tokens at which engines end a response of this model: those of generation_config.json (without the file: of
    config.json) and the tokenizer's EOS."""
    own = _configured(folder)
    eos = read_vocabulary(folder).eos_id
    return own if eos is None or eos in own else [*own, eos]


def complete_generation_config(folder: Path) -> None:
    """Let generation_config.json of an export name every token at which the responses of its training ended."""
    stops = stop_ids(folder)
    if stops == _configured(folder):
        return
    path = folder / "generation_config.json"
    eos = stops[0] if len(stops) == 1 else stops
    write_text(path, json.dumps({**_read(path), "eos_token_id": eos}, indent=2) + "\n")


def _configured(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    eos = _read(path if path.exists() else folder / "config.json").get("eos_token_id")
    tokens = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in tokens):
        raise UserError(f"{path}: eos_token_id {eos!r} is neither a token's number nor a list of such")
    return tokens


def _read(path: Path) -> dict[str, Any]:
    """The object in a file; empty if it is not there or is none, which others report."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
