"""Prompts for rollouts: read once, handed out in a seeded order that a resume continues exactly."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vcppo.config import PromptsConfig
from megatron_vcppo.data.bad_samples import BadSample, DataReport
from megatron_vcppo.data.epoch_order import EpochOrder
from megatron_vcppo.data.fields import answer_text, find, require
from megatron_vcppo.data.mixture import Mixture
from megatron_vcppo.data.named_sources import named_source
from megatron_vcppo.data.prompt_format import DEFAULT_FORMAT, PromptFormat, RenderedPrompt, render_prompt
from megatron_vcppo.data.readers import Sample, read_samples
from megatron_vcppo.data.tokenizer import check_size, encode_texts
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.verifier import UNJUDGED

CheckAnswer = Callable[[str, str], None]
"""Given task and answer, raises ValueError if a verifier could not judge by that answer."""
_BATCH = 1024  # prompts that are tokenized in one call


@dataclass(frozen=True)
class PromptKeys:
    """Where a sample keeps its parts (see data/fields.py), and the task of samples that do not say ("": each must)."""

    prompt: str = "prompt"
    answer: str = "answer"
    task: str = "task"
    default_task: str = ""

    @classmethod
    def of(cls, prompts: PromptsConfig) -> "PromptKeys":
        """As the configuration says."""
        return cls(prompts.prompt_key, prompts.answer_key, prompts.task_key, prompts.task or "")


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_sample: str = "error",
    keys: PromptKeys = PromptKeys(),
    known_tasks: Collection[str] = (),
    check_answer: CheckAnswer | None = None,
    how: PromptFormat = DEFAULT_FORMAT,
) -> tuple[list[Prompt], DataReport]:
    """All prompts of a source (see ``read_samples``), in its order, with ids ``file:line``.

    A prompt is text or chat messages, which ``how`` formats; an answer that is not text becomes its number or JSON.
    keys: problems by name have keys of their own.
    max_length: tokens of a prompt; a longer one cannot be truncated without losing the question, so truncate skips
    it, too. known_tasks: if given, any other task makes a sample bad; so does an answer that check_answer
    refuses.
    Raises UserError for bad samples with on_bad_sample error, and if no prompt is left.
    """
    report = DataReport(source, on_bad_sample)
    if named_source(source):
        keys = PromptKeys()
    parse = partial(_parts, tokenizer, keys=keys, how=how, known_tasks=known_tasks, check_answer=check_answer)
    prompts = list(_read(read_samples(source), tokenizer, max_length, report, parse))
    report.finish()
    return prompts, report


class PromptStream:
    """Endless batches of prompts. No prompt comes too often or too seldom in an epoch, across any resumes.

    A batch may cross the border between two epochs; ids end in ``@epoch`` so that they stay distinct there. A second
    copy within an epoch gets ``+1`` before that.
    """

    def __init__(self, prompts: list[Prompt], seed: int, mixture: Mixture | None = None) -> None:
        """mixture: how often each prompt comes in an epoch; default: once. UserError if there are no prompts."""
        self._prompts = prompts
        self._mixture = mixture or Mixture([(len(prompts), 1.0)], seed)
        self._order = EpochOrder(self._mixture.num_samples, seed, "prompts")

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next prompt belongs to."""
        return self._order.epoch

    @property
    def position(self) -> int:
        """How many prompts were handed out: the place of the next one."""
        return self._order.samples_seen

    def at(self, place: int) -> Prompt:
        """The prompt at this place of the stream, whether it was handed out or not."""
        epoch, index = self._order.at(place)
        return self._prompt(epoch, *self._mixture.at(epoch, index))

    def next(self, num_prompts: int) -> list[Prompt]:
        """The next prompts."""
        return [self._prompt(epoch, *self._mixture.at(epoch, place)) for epoch, place in self._order.next(num_prompts)]

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, as plain numbers for a checkpoint."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken. Raises UserError if the prompts or the seed are not the same."""
        self._order.load_state_dict(state)

    def _prompt(self, epoch: int, index: int, copy: int) -> Prompt:
        prompt = self._prompts[index]
        return replace(prompt, prompt_id=f"{prompt.prompt_id}{f'+{copy}' if copy else ''}@{epoch}")


def _read(
    samples: Iterator[Sample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    report: DataReport,
    parse: Callable[[Sample], tuple[RenderedPrompt, str, str]],
) -> Iterator[Prompt]:
    name = Path(report.source).stem
    while batch := list(islice(samples, _BATCH)):
        rows: list[tuple[int, RenderedPrompt, str, str]] = []
        for sample in batch:
            report.num_samples += 1
            try:
                found = parse(sample)
                check_size(len(found[0].text), max_length)
                rows.append((sample.number, *found))
            except BadSample as problem:
                report.bad(sample.number, problem)
        encoded = {
            special: iter(encode_texts(tokenizer, [row[1].text for row in rows if row[1].special == special], special))
            for special in (False, True)
        }
        for number, prompt, answer, task in rows:
            ids = tuple(next(encoded[prompt.special]))
            if len(ids) > max_length:
                report.bad(number, BadSample("too long", f"{len(ids)} tokens, a prompt may have {max_length}"))
                continue
            report.num_used += 1
            yield Prompt(f"{name}:{number}", ids, prompt.shown, answer, task)


def _parts(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    keys: PromptKeys,
    how: PromptFormat,
    known_tasks: Collection[str],
    check_answer: CheckAnswer | None,
) -> tuple[RenderedPrompt, str, str]:
    """prompt, answer, task"""
    (prompt,) = require(sample, [keys.prompt])
    assert sample.value is not None
    task = find(sample.value, keys.task) or keys.default_task
    answer = find(sample.value, keys.answer) if task == UNJUDGED else require(sample, [keys.answer])[0]
    task = task or require(sample, [keys.task])[0]
    if known_tasks and task not in known_tasks:
        raise BadSample("unknown task", f"{task!r}; there are verifiers for {', '.join(sorted(known_tasks))}")
    rendered = render_prompt(tokenizer, prompt, keys.prompt, how)
    if not rendered.shown.strip():
        raise BadSample("empty prompt", f"{keys.prompt!r} is blank")
    answer = "" if answer is None else answer_text(answer, keys.answer)
    if check_answer is not None:
        try:
            check_answer(str(task), answer)
        except ValueError as error:
            raise BadSample("malformed answer", f"{keys.answer!r}: {error}") from None
    return rendered, answer, str(task)
