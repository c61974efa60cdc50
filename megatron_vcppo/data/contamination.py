"""Which held-out prompts a model has seen in training: the same text but for its layout, or long pieces of it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

NGRAM = 13
"""Words of a piece, as in the field's reports on contamination (GPT-3, PaLM)."""
COMMON = 10
"""A piece in more training prompts than this is part of a template, not of a problem."""
MUCH = 0.5
"""Share of a prompt's pieces that counts as wrong."""
_LAYOUT = re.compile(r"\*\*|[$\\{}\"'`“”‘’]|[.,;:?](?!\d)")
_LOOSE_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")


@dataclass(frozen=True)
class Overlap:
    """Held-out prompts against those of one training source."""

    training: str
    """The key of the configuration, such as sft.train."""
    held_out: str
    equal: tuple[str, ...]
    """Held-out prompts that training has, too, but for case, blanks and punctuation."""
    shares: tuple[tuple[float, str], ...]
    """(share of its pieces that training has, prompt) of each other prompt with at least 13 words."""
    num_prompts: int
    """Held-out prompts."""

    def lines(self) -> Iterator[str]:
        """The findings as text."""
        if self.shares:
            mean = sum(share for share, _ in self.shares) / len(self.shares)
            yield (
                f"{self.held_out} in {self.training}: of the {NGRAM}-grams of a prompt {mean:.1%} on average, "
                f"{max(self.shares)[0]:.1%} at most"
            )

    def problems(self) -> Iterator[str]:
        """What is wrong enough to be fixed before a run."""
        if self.equal:
            share = f"{len(self.equal):,} of {self.num_prompts:,} ({len(self.equal) / self.num_prompts:.1%})"
            yield f"{self.held_out}: {share} prompts are in {self.training}, too, such as {_short(self.equal[0])!r}"
        if much := [prompt for share, prompt in self.shares if share >= MUCH]:
            share = f"{len(much):,} of {self.num_prompts:,} ({len(much) / self.num_prompts:.1%})"
            yield (
                f"{self.held_out}: {share} prompts have half or more of their {NGRAM}-grams in {self.training}, "
                f"such as {_short(much[0])!r}"
            )


def compare(training: str, known: Sequence[str], held_out: str, prompts: Sequence[str]) -> Overlap:
    """The prompts of the held-out key against the known ones of the training key.

    Takes time linear in the number of words, and memory for the held-out pieces only.
    """
    normal = [normalized(prompt) for prompt in prompts]
    known_normal = {_LOOSE_SPACE.sub("", text) for text in map(normalized, known)}
    is_equal = [_LOOSE_SPACE.sub("", text) in known_normal for text in normal]
    pieces = [_pieces(text) for text in normal]
    of_templates = _in_most(pieces)
    seen: Counter[str] = Counter(dict.fromkeys((piece for own in pieces for piece in own), 0))
    for text in map(normalized, known):
        seen.update(piece for piece in _pieces(text) if piece in seen)
    shares = []
    for prompt, own, equal in zip(prompts, pieces, is_equal, strict=True):
        counted = [piece for piece in own if piece not in of_templates and seen[piece] <= COMMON]
        if counted and not equal:
            shares.append((sum(seen[piece] > 0 for piece in counted) / len(counted), prompt))
    equals = tuple(prompt for prompt, equal in zip(prompts, is_equal, strict=True) if equal)
    return Overlap(training, held_out, equals, tuple(shares), len(prompts))


def normalized(prompt: str) -> str:
    r"""Lower case, single blanks, no quotes, dollars, braces, backslashes, sentence marks; signs of calculation stay.

    "Find  $\frac{1}{2} + X$." becomes "find frac12 + x".
    """
    return " ".join(_LAYOUT.sub("", prompt.casefold()).split())


def _pieces(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}


def _in_most(pieces: Iterable[set[str]]) -> set[str]:
    """The pieces that more than half of the prompts have: what a template puts around each."""
    all_pieces = list(pieces)
    count = Counter(piece for own in all_pieces for piece in own)
    return {piece for piece, times in count.items() if times > max(1, len(all_pieces) / 2)}


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"
