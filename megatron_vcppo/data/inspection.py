"""What data look like as tokens: lengths, duplicates, overlap, samples; and what is wrong with them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_vcppo.data.bad_samples import DataReport
from megatron_vcppo.data.sft_dataset import SftDataset
from megatron_vcppo.records import Prompt, TrainSequence

PERCENTILES = (10, 50, 90, 99)
END_WIDTH = 600
"""Characters that are shown of each end of a long sample."""
MUCH = 0.05
"""Share of bad or too long samples that counts as wrong."""
MANY_COPIES = 0.5
"""Share of repeated prompts that counts as wrong."""


@dataclass(frozen=True)
class Inspected:
    """The data of one key."""

    key: str
    """Such as prompts.train."""
    report: DataReport
    stops_run: bool
    """Whether a run stops at the first bad samples (bad_samples is error)."""
    limits: Mapping[str, int]
    """What a limit comes from → tokens; the first is the one above which samples are bad."""
    lengths: np.ndarray
    """Tokens of each sample, [samples]."""
    prompts: list[str]
    """Each prompt as the model reads it, in lower case and with single blanks, so that copies are equal."""
    shown: list[str] = field(default_factory=list)
    """A few samples, see ``show``."""

    def num_above(self, limit: int) -> int:
        """Samples with more tokens."""
        return int((self.lengths > limit).sum())

    @property
    def num_copies(self) -> int:
        """Samples whose prompt came before."""
        return len(self.prompts) - len(set(self.prompts))

    def lines(self) -> Iterator[str]:
        """The findings as text."""
        count = len(self.lengths)
        yield f"{self.key}: {self.report}"
        yield f"  tokens: {length_text(self.lengths)}"
        for name, limit in self.limits.items():
            yield f"  above {limit:,} tokens ({name}): {_share(self.num_above(limit), count)}"
        yield f"  prompts that came before: {_share(self.num_copies, count)}"
        for text in self.shown:
            yield f"  sample: {text}"

    def problems(self) -> Iterator[str]:
        """What is wrong enough to be fixed before a run."""
        count, num_bad = len(self.lengths), sum(self.report.counts.values())
        if num_bad and (self.stops_run or num_bad > MUCH * self.report.num_samples):
            stops = ", at which a run stops (bad_samples: error)" if self.stops_run else ""
            yield f"{self.key}: {_share(num_bad, self.report.num_samples)} are bad samples{stops}"
        name, limit = next(iter(self.limits.items()))
        num_above = self.num_above(limit)
        if num_above and (self.stops_run or num_above > MUCH * count):
            yield f"{self.key}: {_share(num_above, count)} are above {limit:,} tokens ({name})"
        if self.num_copies > MANY_COPIES * count:
            yield f"{self.key}: {_share(self.num_copies, count)} are copies of earlier prompts; remove them"


def as_sequences(prompts: Sequence[Prompt]) -> list[TrainSequence]:
    """Prompts like examples: no token has loss."""
    return [TrainSequence(prompt.token_ids, {"loss_mask": (False,) * len(prompt.token_ids)}) for prompt in prompts]


def prompt_texts(tokenizer: PreTrainedTokenizerBase, sequences: SftDataset | Sequence[TrainSequence]) -> list[str]:
    """What stands before the first token with loss, without special tokens, case and repeated blanks."""
    parts = []
    for index in range(len(sequences)):
        mask = sequences[index].fields["loss_mask"]
        end = mask.index(True) if True in mask else len(mask)
        parts.append(list(sequences[index].token_ids[:end]))
    texts = tokenizer.batch_decode(parts, skip_special_tokens=True) if parts else []
    return [" ".join(text.casefold().split()) for text in texts]


def show(tokenizer: PreTrainedTokenizerBase, sequence: TrainSequence) -> str:
    """A sample with its special tokens, and ⟦…⟧ around what has loss; line breaks are written as ⏎.

    A long one is shown from both ends.
    """
    pairs = zip(sequence.token_ids, sequence.fields["loss_mask"], strict=True)
    text = ""
    for has_loss, group in groupby(pairs, key=lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        text += f"⟦{part}⟧" if has_loss else part
    text = text.replace("\n", "⏎")
    return text if len(text) <= 2 * END_WIDTH else f"{text[:END_WIDTH]} […] {text[-END_WIDTH:]}"


def length_text(lengths: np.ndarray) -> str:
    """Example: ``min 4, 10 % ≤ 6, median 12, 90 % ≤ 20, 99 % ≤ 31, max 40, sum 1,234``."""
    if not len(lengths):
        return "none"
    places = np.percentile(lengths, PERCENTILES, method="higher").astype(int)
    middle = [f"{'median' if p == 50 else f'{p} % ≤'} {n:,}" for p, n in zip(PERCENTILES, places, strict=True)]
    return ", ".join([f"min {lengths.min():,}", *middle, f"max {lengths.max():,}", f"sum {lengths.sum():,}"])


def _share(count: int, whole: int) -> str:
    return f"{count:,} of {whole:,} ({count / max(whole, 1):.1%})"
