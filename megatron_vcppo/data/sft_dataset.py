"""Supervised examples: prompt and response, or a chat, as token ids with the loss on what the model should say."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_vcppo.config import SftConfig
from megatron_vcppo.data.bad_samples import BadSample, DataReport
from megatron_vcppo.data.fields import find, require
from megatron_vcppo.data.prompt_format import (
    DEFAULT_FORMAT,
    END_THINK,
    PromptFormat,
    after_opening,
    opens_thinking,
    render_chat,
    render_prompt,
)
from megatron_vcppo.data.readers import Sample, read_samples
from megatron_vcppo.data.tokenizer import Messages, check_messages, check_size, encode_texts
from megatron_vcppo.records import TrainSequence
from megatron_vcppo.run.files import replacing

Progress = Callable[[int, float], None]
"""Called now and then with (samples read, fraction of the source read)."""

_ARRAYS = ("token_ids", "loss_mask", "borders", "sizes")
_BATCH = 512  # samples that are tokenized in one call


@dataclass(frozen=True)
class SftKeys:
    """Where a sample keeps its parts (see data/fields.py). A sample with the key ``messages`` is a chat."""

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"

    @classmethod
    def of(cls, sft: SftConfig) -> "SftKeys":
        """As the configuration says."""
        return cls(sft.prompt_key, sft.response_key, sft.messages_key)


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is tokenized by itself, as an engine would see it."""

    text: str
    loss: bool
    special: bool = False
    """Whether the tokenizer adds its special tokens (BOS)."""


class SftDataset:
    """All examples in three flat arrays: 5 bytes a token, whatever the size of the source."""

    def __init__(
        self, token_ids: np.ndarray, loss_mask: np.ndarray, borders: np.ndarray, sizes: np.ndarray | None = None
    ) -> None:
        """token_ids [N] int32, loss_mask [N] bool, borders [examples + 1] int64, sizes [sources] int64: examples of
        each source (default: of one)."""
        self._token_ids, self._loss_mask, self._borders = token_ids, loss_mask, borders
        self._sizes = np.array([len(borders) - 1]) if sizes is None else sizes

    def __len__(self) -> int:
        return len(self._borders) - 1

    def save(self, folder: Path) -> None:
        """Write the arrays to a folder, replacing it; it has its name only when it is whole."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder) as temporary:
            temporary.mkdir()
            for name in _ARRAYS:
                _write_array(temporary / f"{name}.npy", getattr(self, f"_{name}"))

    @classmethod
    def load(cls, folder: Path) -> "SftDataset":
        """What ``save`` wrote, mapped rather than read: ranks on one node share the memory."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS))

    @classmethod
    def joined(cls, sources: "Sequence[SftDataset]") -> "SftDataset":
        """The examples of several sources, one after the other."""
        return cls(
            np.concatenate([source._token_ids for source in sources]),
            np.concatenate([source._loss_mask for source in sources]),
            np.concatenate([[0], *(source.lengths for source in sources)]).cumsum(),
            np.array([len(source) for source in sources], dtype=np.int64),
        )

    @property
    def sizes(self) -> list[int]:
        """Examples of each source."""
        return self._sizes.tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, [examples] int64."""
        return np.diff(self._borders)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss, over all examples."""
        return int(self._loss_mask.sum())

    def __getitem__(self, index: int) -> TrainSequence:
        """One example with the field ``loss_mask``."""
        part = slice(self._borders[index], self._borders[index + 1])
        return TrainSequence(
            tuple(self._token_ids[part].tolist()), {"loss_mask": tuple(self._loss_mask[part].tolist())}
        )


def _write_array(path: Path, array: np.ndarray) -> None:
    """As np.save does, but for the error on a full disk, which does not say there that the disk is full."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def load_sft_dataset(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_sample: str = "error",
    keys: SftKeys = SftKeys(),
    on_progress: Progress | None = None,
    how: PromptFormat = DEFAULT_FORMAT,
    stops: Sequence[int] = (),
) -> tuple[SftDataset, DataReport]:
    """Read, tokenize and check a source; a response ends with EOS, or with another of ``stops`` if it has one there.

    max_length: tokens; a longer example is bad. on_bad_sample: error | skip | truncate (an example that is too
    long, skip what cannot be). how: see ``render_prompt``. The report says what became of each sample; the caller
    prints it.
    Raises UserError for bad samples with on_bad_sample error, and if no sample is usable.
    """
    report = DataReport(source, on_bad_sample)
    token_ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    parse = partial(sample_pieces, tokenizer, keys=keys, how=how)
    for ids, mask in _encode_all(read_samples(source), tokenizer, max_length, parse, report, on_progress, stops):
        token_ids.append(ids)
        masks.append(mask)
    report.finish()
    borders = np.cumsum([0, *map(len, token_ids)], dtype=np.int64)
    return SftDataset(np.concatenate(token_ids), np.concatenate(masks), borders), report


def _encode_all(
    samples: Iterator[Sample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    parse: Callable[[Sample], "list[Piece]"],
    report: DataReport,
    on_progress: Progress | None,
    stops: Sequence[int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while batch := list(islice(samples, _BATCH)):
        pieces: list[list[Piece] | None] = []
        for sample in batch:
            report.num_samples += 1
            try:
                found = parse(sample)
                check_size(sum(len(piece.text) for piece in found), max_length)
                pieces.append(found)
            except BadSample as problem:
                report.bad(sample.number, problem)
                pieces.append(None)
        encoded = iter(_encode_pieces(tokenizer, [piece for row in pieces if row for piece in row]))
        for sample, row in zip(batch, pieces, strict=True):
            if row is None:
                continue
            ids, mask = _join(row, [next(encoded) for _ in row], tokenizer.eos_token_id, stops)
            if not any(mask):
                report.bad(sample.number, BadSample("empty response", "it has no token that could be learned"))
                continue
            if len(ids) > max_length:
                kept = sum(mask[:max_length])
                report.bad(sample.number, BadSample("too long", f"{len(ids)} tokens, model.max_length is {max_length}"))
                if report.on_bad_sample != "truncate" or not kept:
                    continue
                report.num_truncated += 1
                ids, mask = ids[:max_length], mask[:max_length]
            report.num_used += 1
            yield np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_)
        if on_progress:
            on_progress(report.num_samples, batch[-1].fraction)


def sample_pieces(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, keys: SftKeys, how: PromptFormat = DEFAULT_FORMAT
) -> list[Piece]:
    """The text of one sample, in pieces with and without loss.

    Raises BadSample: malformed, missing key, wrong type, empty response, bad chat.
    """
    if sample.value is not None and (messages := find(sample.value, keys.messages)) is not None:
        return chat_pieces(tokenizer, how.chat(check_messages(messages, keys.messages)), how)
    prompt, response = require(sample, [keys.prompt, keys.response])
    if not isinstance(response, str):
        raise BadSample("wrong type", f"{keys.response!r} is a {type(response).__name__}, not text")
    if not response.strip():
        raise BadSample("empty response", f"{keys.response!r} is blank")
    rendered = render_prompt(tokenizer, prompt, keys.prompt, how)
    return [
        Piece(rendered.text, loss=False, special=rendered.special),
        Piece(after_opening(rendered.text, response), loss=True),
    ]


def chat_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, how: PromptFormat = DEFAULT_FORMAT
) -> list[Piece]:
    """A chat in pieces, assistant turns with loss, exactly where the template puts them.

    The template is rendered up to each assistant turn (opened, as for sampling) and through it; both must be the
    beginning of the whole rendering. A template that rewrites earlier turns (dropping their thinking, say) fails
    that check, and the sample counts as bad: its turns would not be what the model sees when it samples. The last turn
    is exempt where the template opens <think> for the response and drops the thinking of turns that are past: its
    content, from behind the tag, is what the model would sample.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadSample("empty response", "the chat has no assistant turn")
    if turns[-1] != len(messages) - 1:
        messages = messages[: turns[-1] + 1]  # nothing after the last assistant turn is learned from
    whole = render_chat(tokenizer, messages, for_response=False, how=how)
    pieces: list[Piece] = []
    done = 0
    for turn in turns:
        if not messages[turn]["content"].strip():
            raise BadSample("empty response", f"message {turn} is blank")
        before = render_chat(tokenizer, messages[:turn], for_response=True, how=how)
        through = render_chat(tokenizer, messages[: turn + 1], for_response=False, how=how)
        content = messages[turn]["content"]
        thinks = opens_thinking(before) and END_THINK in content
        if turn == turns[-1] and thinks and before.startswith(whole[:done]):
            pieces += [Piece(before[done:], loss=False), Piece(after_opening(before, content), loss=True)]
            return pieces
        if not (whole.startswith(through) and through.startswith(before) and len(before) >= done):
            raise BadSample("bad chat", f"the chat template does not append message {turn} to what it wrote before")
        # A turn ends at <|im_end|> or the like; the newline that a template writes behind it is never sampled.
        end = len(through.rstrip())
        pieces += [
            Piece(whole[done : len(before)], loss=False),
            Piece(whole[len(before) : end], loss=True),
        ]
        done = end
    return pieces


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in pieces]
    for special in (False, True):
        places = [i for i, piece in enumerate(pieces) if piece.special == special]
        for place, ids in zip(places, encode_texts(tokenizer, [pieces[i].text for i in places], special), strict=True):
            rows[place] = ids
    return rows


def _join(
    pieces: list[Piece], encoded: list[list[int]], eos_token_id: int, stops: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """One example; the last piece is a response, and a token at which engines stop ends it."""
    ids = [i for part in encoded for i in part]
    mask = [piece.loss for piece, part in zip(pieces, encoded, strict=True) for _ in part]
    if not ids or ids[-1] not in (eos_token_id, *stops):
        ids.append(eos_token_id)
        mask.append(True)
    mask[0] = False  # nothing predicts the first token
    return ids, mask
