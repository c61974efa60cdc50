"""A running sum whose steps can be computed by a calculator: the synthetic task with several turns.

A call is ``chk before operation ?``; generation pauses behind it, the calculator's digit follows, and generation
continues. A step in the head is ``operation result`` and may go wrong; the calculator is always right.
"""

from dataclasses import dataclass
from random import Random

from megatron_vcppo.records import Prompt
from megatron_vcppo.tasks.chain import RUNNING_SUM, add
from megatron_vcppo.tasks.task import Problem, Style, write_response
from megatron_vcppo.tasks.word_tokenizer import ASK, CHECK, DIGITS, INDICES, MAX_STEPS, SUM_OPS


@dataclass(frozen=True)
class ToolSumTask:
    """The problems of running_sum.

    Example: prompt ``3 #1 +4 #2 -9 ?``, response ``<think> #1 +4 7 #2 chk 7 -9 ? 8 </think> = 8``, of which the
    calculator wrote the digit behind ``?``.
    """

    name: str = "tool_sum"
    default_steps: tuple[int, int] = (6, 12)
    max_steps: int = MAX_STEPS

    def problem(self, rng: Random, num_steps: int) -> Problem:
        """As in running_sum."""
        return RUNNING_SUM.problem(rng, num_steps)

    def demonstration(self, rng: Random, prompt: str, style: Style) -> str:
        """Writers call the calculator where those of running_sum check, and believe it."""
        words = prompt.split()
        digit, operations = int(words[0]), words[2:-1:2]
        quits, call_rate = style.draw(rng)
        num_steps = rng.randrange(len(operations)) if quits else len(operations)
        steps: list[str] = []
        for index, operation in zip(INDICES, operations[:num_steps], strict=False):
            (result,) = add((digit,), operation)
            if rng.random() < call_rate:
                steps += [index, CHECK, DIGITS[digit], operation, ASK, DIGITS[result]]
            else:
                if rng.random() < style.mistake_rate:
                    result = (result + rng.randrange(1, 10)) % 10
                steps += [index, operation, DIGITS[result]]
            digit = result
        return write_response(steps, DIGITS[digit])

    def is_correct(self, prompt: str, answer: str, given: str) -> bool:
        """The last digit."""
        return RUNNING_SUM.is_correct(prompt, answer, given)


@dataclass(frozen=True)
class DigitCalculator:
    """The tool of the task (``rewards/tools.py``)."""

    stop: str = ASK

    def __call__(self, prompt: Prompt, text: str) -> str:
        """The digit of a call at the end of the text; "" for what is no call."""
        words = text.split()[-4:]
        match words:
            case [call, digit, operation, end] if call == CHECK and end == ASK and digit in DIGITS:
                return DIGITS[add((int(digit),), operation)[0]] if operation in SUM_OPS else ""
        return ""


TOOL_SUM = ToolSumTask()
