"""What a synthetic long chain-of-thought task is: problems, demonstrations with mistakes, answers behind the tags.

Every response reads ``<think> steps </think> = answer``. Demonstrations are imperfect on purpose: steps go wrong,
some writers check their steps and correct themselves, some stop thinking early. A policy trained on them is right
more often the longer it thinks, and can always give up: what value-calibrated PPO is about.
"""

from dataclasses import dataclass
from random import Random
from typing import Protocol

from megatron_vcppo.tasks.word_tokenizer import ANSWER, END_THINK, THINK


@dataclass(frozen=True)
class Problem:
    """A prompt and its answer, as blank-separated words."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Style:
    """How demonstrations are written. The defaults are those under which plain PPO was seen to collapse."""

    mistake_rate: float = 0.2
    """Probability that a step's result is wrong."""
    check_mistake_rate: float = 0.005
    """Probability that a check's result is wrong; a check replaces the result that it checks."""
    never_check: float = 0.15
    half_check: float = 0.15
    always_check: float = 0.45
    """Shares of writers who check no step, half of the steps at random, every step."""
    quit_early: float = 0.25
    """Share of writers who stop after a random number of steps and answer what they have."""

    def draw(self, rng: Random) -> tuple[bool, float]:
        """One writer: (stops early, probability of checking a step)."""
        kind = rng.choices(range(4), (self.never_check, self.half_check, self.always_check, self.quit_early))[0]
        return (True, rng.choice((0.0, 0.5, 1.0))) if kind == 3 else (False, (0.0, 0.5, 1.0)[kind])


DEFAULT_STYLE = Style()


class Task(Protocol):
    """One kind of problem. ``num_steps`` is the difficulty dial."""

    @property
    def name(self) -> str:
        """The ``task`` of its prompts."""

    @property
    def default_steps(self) -> tuple[int, int]:
        """Smallest and largest number of steps by default."""

    @property
    def max_steps(self) -> int:
        """Largest number of steps that can be requested."""

    def problem(self, rng: Random, num_steps: int) -> Problem:
        """Draw a problem whose solution has ``num_steps`` steps."""

    def demonstration(self, rng: Random, prompt: str, style: Style) -> str:
        """Write a response to a prompt of this task, right or wrong."""

    def is_correct(self, prompt: str, answer: str, given: str) -> bool:
        """Whether ``given``, the response's answer behind the tags, solves the prompt."""


def write_response(steps: list[str], answer: str) -> str:
    """Steps between thinking tags, then the answer."""
    return " ".join([THINK, *steps, END_THINK, ANSWER, answer])


def read_answer(response: str) -> str | None:
    """The answer behind a response's last ``</think> =``, as words joined by blanks; None if there is none."""
    words = response.split()
    for i in reversed(range(len(words))):
        if words[i] == END_THINK:
            return " ".join(words[i + 2 :]) or None if words[i + 1 : i + 2] == [ANSWER] else None
    return None
