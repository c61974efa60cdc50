"""Chains: a start and a list of operations, one step for each; the last state is the answer.

A step is ``#i operation state``; a check recomputes it from the state before: ``chk before operation state``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from megatron_vcppo.tasks.task import Problem, Style, write_response
from megatron_vcppo.tasks.word_tokenizer import ASK, CHECK, DIGITS, INDICES, LIST_OPS, MAX_STEPS, SUM_OPS

State = tuple[int, ...]


@dataclass(frozen=True)
class ChainTask:
    """Digits that are transformed step by step.

    Example (running_sum): prompt ``3 #1 +4 #2 -9 ?``, response ``<think> #1 +4 7 #2 -9 8 </think> = 8``.
    """

    name: str
    num_digits: int
    operations: tuple[str, ...]
    apply: Callable[[State, str], State]
    default_steps: tuple[int, int]
    max_steps: int = MAX_STEPS

    def problem(self, rng: Random, num_steps: int) -> Problem:
        """Start and operations are uniform."""
        start = tuple(rng.choices(range(10), k=self.num_digits))
        operations = rng.choices(self.operations, k=num_steps)
        state = start
        for operation in operations:
            state = self.apply(state, operation)
        steps = [word for pair in zip(INDICES, operations, strict=False) for word in pair]
        return Problem(" ".join([_words(start), *steps, ASK]), _words(state))

    def demonstration(self, rng: Random, prompt: str, style: Style) -> str:
        """Mistakes are carried on unless a check corrects them; an early stop answers the state reached."""
        words = prompt.split()
        state: State = tuple(map(int, words[: self.num_digits]))
        operations = words[self.num_digits + 1 : -1 : 2]
        quits, check_rate = style.draw(rng)
        num_steps = rng.randrange(len(operations)) if quits else len(operations)
        steps: list[str] = []
        for index, operation in zip(INDICES, operations[:num_steps], strict=False):
            before = state
            state = self._noisy(rng, before, operation, style.mistake_rate)
            steps += [index, operation, _words(state)]
            if rng.random() < check_rate:
                state = self._noisy(rng, before, operation, style.check_mistake_rate)
                steps += [CHECK, _words(before), operation, _words(state)]
        return write_response(steps, _words(state))

    def is_correct(self, prompt: str, answer: str, given: str) -> bool:
        """The last state, digit by digit."""
        return given.split() == answer.split()

    def _noisy(self, rng: Random, state: State, operation: str, mistake_rate: float) -> State:
        """The operation's result, or, with the given probability, that with one digit wrong."""
        result = self.apply(state, operation)
        if rng.random() >= mistake_rate:
            return result
        place = rng.randrange(self.num_digits)
        wrong = (result[place] + rng.randrange(1, 10)) % 10
        return (*result[:place], wrong, *result[place + 1 :])


def _words(state: State) -> str:
    return " ".join(DIGITS[digit] for digit in state)


def add(state: State, operation: str) -> State:
    """+k or -k, modulo 10."""
    return ((state[0] + int(operation)) % 10,)


def transform(state: State, operation: str) -> State:
    """One operation on a list of digits: reverse, rotate left, swap the ends, sort, raise or lower all by 1 mod 10."""
    match operation:
        case "reverse":
            return state[::-1]
        case "rotate":
            return (*state[1:], state[0])
        case "swap":
            return (state[-1], *state[1:-1], state[0])
        case "sort":
            return tuple(sorted(state))
        case "raise":
            return tuple((digit + 1) % 10 for digit in state)
        case "lower":
            return tuple((digit - 1) % 10 for digit in state)
    raise AssertionError(operation)


RUNNING_SUM = ChainTask("running_sum", 1, SUM_OPS, add, default_steps=(12, 24))
LIST_OPERATIONS = ChainTask("list_ops", 4, LIST_OPS, transform, default_steps=(6, 12))
