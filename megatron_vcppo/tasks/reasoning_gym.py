"""Problems of the library reasoning-gym, which makes them from a seed and scores answers to them.

An optional package: it is imported when a problem is made or scored, and a missing one is a UserError. A problem is
named by its data set, settings and index, and made again where it is scored, because what its scoring needs (sets,
tuples, boards) is not always JSON.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from megatron_vcppo.errors import UserError
from megatron_vcppo.tasks.generate import split_of

TASK = "reasoning_gym"
"""The ``task`` of every such problem, and the name of its verifier."""
INSTRUCTION = "Think step by step, and give only your final answer between <answer> and </answer>."
DEFAULT_SIZE = 500
SPLITS = ("train", "test")
EVALUATING = frozenset(
    {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24"}
    | {"simple_integration", "spiral_matrix", "string_insertion"}
)
"""Data sets whose scoring evaluates the answer as Python (reasoning-gym 0.1.25): see ``_is_plain``."""
CHANGING = frozenset(
    {"isomorphic_strings", "knight_swap", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Data sets whose problems depend on the hash seed of the process (reasoning-gym 0.1.25): ranks would disagree."""
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan"}
    | {"sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "Abs"}
)
_DRAWS_PER_PROBLEM = 40  # 1 of 20 is held out
_SPARE_DRAWS = 400


def check_source(dataset: str, options: Mapping[str, Any]) -> None:
    """Raises UserError if the package is missing, the data set cannot be used or split is wrong; imports nothing."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"reasoning_gym:{dataset} needs a package that is not installed: pip install reasoning-gym")
    if dataset in CHANGING:
        raise UserError(f"reasoning_gym:{dataset} cannot be used: the library makes other problems in every process")
    if options.get("split", "train") not in SPLITS:
        raise UserError(f"reasoning_gym:{dataset}: split {options['split']!r} is not one of {', '.join(SPLITS)}")


def rows(dataset: str, options: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Rows {prompt, answer, task}: ``size`` different problems of a split, in the order of the data set.

    A problem is held out or not by its text alone (``split_of``), so no seed can bring a test problem into training.
    dataset: its name in reasoning-gym. options: ``size``, ``seed`` (0), ``split`` (train or test), and settings of the
    data set. Raises UserError if the package or the data set is missing, a setting is wrong, or there are fewer
    problems.
    """
    check_source(dataset, options)
    settings = {"seed": 0, **options}
    split = settings.pop("split", "train")
    size = settings.pop("size", DEFAULT_SIZE)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"reasoning_gym:{dataset}: size {size!r} is not a positive integer")
    settings["size"] = num_draws = _DRAWS_PER_PROBLEM * size + _SPARE_DRAWS
    found = list(islice(_different(dataset, settings, split, num_draws), size))
    if len(found) < size:
        raise UserError(
            f"reasoning_gym:{dataset} has only {len(found)} different {split} problems with these settings, not "
            f"{size}: set size={len(found)} or other settings"
        )
    yield from found


def score(reference: str, answer: str) -> float:
    """The data set's own score of an answer, from 0 to 1; reference: a row's ``answer``.

    Raises ValueError if the reference is no such row, or the installed version makes another problem of it.
    """
    try:
        named = json.loads(reference)
        dataset, settings, index, expected = (named[key] for key in ("dataset", "settings", "index", "answer"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the answer of a {TASK} problem names its data set, settings, index and answer") from error
    made = _dataset(dataset, json.dumps(settings))
    entry = made[index]
    if str(entry["answer"]) != expected:
        raise ValueError(f"problem {index} of {dataset} is another one in the installed version of reasoning-gym")
    if dataset in EVALUATING and not _is_plain(answer):
        return 0.0
    return float(made.score_answer(answer, entry))


def _different(dataset: str, settings: dict[str, Any], split: str, num_draws: int) -> Iterator[dict[str, str]]:
    made = _dataset(dataset, json.dumps(settings))
    seen: set[str] = set()
    for index in range(num_draws):
        entry = made[index]
        question = entry["question"]
        if (split_of(question) == "test") != (split == "test") or question in seen:
            continue
        seen.add(question)
        named = {"dataset": dataset, "settings": settings, "index": index, "answer": str(entry["answer"])}
        yield {"prompt": f"{question}\n\n{INSTRUCTION}", "answer": json.dumps(named), "task": TASK}


@lru_cache(maxsize=64)
def _dataset(name: str, settings: str) -> Any:
    """The library's object. settings: JSON. Raises UserError if there is no such data set or setting."""
    import reasoning_gym  # two seconds: only where its problems are used
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS or name == "composite":
        raise UserError(f"reasoning_gym:{name}: no such data set; there are {', '.join(sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(name, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning_gym:{name}: the library refuses the settings {settings}: {error}") from error


def _is_plain(answer: str) -> bool:
    """Whether evaluating an answer can only compute: ASCII without underscores, attributes and calls of unknown names.

    What a model wrote must not be able to run code of its choice with the rights of the verifier.
    """
    called = re.findall(r"([A-Za-z]\w*)\s*\(", answer)
    attributes_or_calls = re.search(r"[A-Za-z)\]}\"']\s*\.|\.\s*[A-Za-z]|[)\]}\"']\s*\(", answer)
    return answer.isascii() and "_" not in answer and not attributes_or_calls and set(called) <= _FUNCTIONS
