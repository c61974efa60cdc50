"""Problems and demonstrations from a seed, with a held-out set that no seed can mix into training."""

import zlib
from collections.abc import Iterator
from itertools import islice
from random import Random

from megatron_vcppo.errors import UserError
from megatron_vcppo.tasks.chain import LIST_OPERATIONS, RUNNING_SUM
from megatron_vcppo.tasks.search import SEARCH
from megatron_vcppo.tasks.task import DEFAULT_STYLE, Problem, Style, Task
from megatron_vcppo.tasks.tool_sum import TOOL_SUM

TASKS: dict[str, Task] = {task.name: task for task in (RUNNING_SUM, LIST_OPERATIONS, SEARCH, TOOL_SUM)}
"""Every synthetic task by its name, which is the ``task`` of its prompts."""

_MAX_REJECTED = 20_000


def get_task(name: str) -> Task:
    """The task of that name. Raises UserError that lists the names."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; the synthetic tasks are {', '.join(TASKS)}")
    return TASKS[name]


def split_of(prompt: str) -> str:
    """train (18 of 20), validation or test: a property of the prompt, whatever seed it came from."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(prompt.encode()) % 20, "train")


def problems(task: Task, split: str, steps: tuple[int, int], seed: str, unique: bool = False) -> Iterator[Problem]:
    """An endless stream of problems of one split; numbers of steps are uniform from steps[0] to steps[1].

    unique: no prompt appears twice. Raises UserError if the task has no more of them.
    """
    rng = Random(seed)
    seen: set[str] = set()
    num_rejected = 0
    while True:
        problem = task.problem(rng, rng.randint(*steps))
        if split_of(problem.prompt) != split or problem.prompt in seen:
            num_rejected += 1
            if num_rejected > _MAX_REJECTED:
                raise UserError(f"task {task.name} has only about {len(seen)} {split} problems of {steps} steps")
            continue
        num_rejected = 0
        if unique:
            seen.add(problem.prompt)
        yield problem


def prompt_rows(
    task: Task, split: str, steps: tuple[int, int], seed: int, count: int, unique: bool = False
) -> Iterator[dict[str, str]]:
    """``count`` rows {prompt, answer, task}, as PPO and evaluation read them.

    Args:
        task: whose problems.
        split: train | validation | test.
        steps: smallest and largest number of steps.
        seed: equal seeds give equal rows.
        count: rows.
        unique: no prompt appears twice; raises UserError if the task has fewer.
    """
    for problem in islice(problems(task, split, steps, f"{seed}/{task.name}/{split}/prompts", unique), count):
        yield {"prompt": problem.prompt, "answer": problem.answer, "task": task.name}


def demonstration_rows(
    task: Task, split: str, steps: tuple[int, int], seed: int, count: int, style: Style = DEFAULT_STYLE
) -> Iterator[dict[str, str]]:
    """``count`` rows {prompt, response, answer, task}, as SFT reads them.

    Args:
        task: whose problems.
        split: train | validation | test.
        steps: smallest and largest number of steps.
        seed: equal seeds give equal rows.
        count: rows.
        style: of the writers, see ``Style``.
    """
    rng = Random(f"{seed}/{task.name}/{split}/writers")
    for problem in islice(problems(task, split, steps, f"{seed}/{task.name}/{split}/demonstrations"), count):
        response = task.demonstration(rng, problem.prompt, style)
        yield {"prompt": problem.prompt, "response": response, "answer": problem.answer, "task": task.name}
