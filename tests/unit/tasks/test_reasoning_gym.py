"""Problems of reasoning-gym: held out by their text, scored by the library, and refused with one line without it.

A stand-in for the library serves most tests; the last ones need the real one (pip install reasoning-gym).
"""

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.data.named_sources import check_named, named_source
from megatron_vcppo.data.prompts import PromptKeys, load_prompts
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.rewards.registry import VERIFIERS
from megatron_vcppo.rewards.scorer import Scorer
from megatron_vcppo.tasks import reasoning_gym
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()


class Sums:
    """As the library's data sets: problem i depends on seed + i; half of the score for being close."""

    def __init__(self, seed: int, size: int, terms: int = 2) -> None:
        if terms < 2:
            raise AssertionError("terms must be at least 2")
        self.seed, self.size, self.terms = seed, size, terms

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = [(self.seed + index) % 997 + i for i in range(self.terms)]
        return {"question": " + ".join(map(str, numbers)) + " ?", "answer": str(sum(numbers)), "metadata": {}}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        difference = abs(int(answer) - int(entry["answer"]))
        return {0: 1.0, 1: 0.5}.get(difference, 0.0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package: Any = types.ModuleType("reasoning_gym")
    package.__spec__ = types.SimpleNamespace()
    package.__path__ = []
    factory: Any = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"sums": Sums, "countdown": Sums}
    package.create_dataset = lambda name, **settings: factory.DATASETS[name](**settings)
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    reasoning_gym._dataset.cache_clear()
    yield
    reasoning_gym._dataset.cache_clear()


def prompts(source: str) -> list[Prompt]:
    keys = PromptKeys(prompt="question", answer="target")  # of the user's other data
    return load_prompts(source, TOKENIZER, 10_000, keys=keys, known_tasks=VERIFIERS)[0]


def judge(prompt: Prompt, response: str) -> str:
    return VERIFIERS[prompt.task](prompt, response).verdict


def test_no_seed_brings_a_test_problem_into_training(library: None) -> None:
    held_out = {p.text for p in prompts("reasoning_gym:sums?size=20&split=test&seed=5")}
    assert len(held_out) == 20
    for seed in (0, 5, 300):
        train = [p.text for p in prompts(f"reasoning_gym:sums?size=200&seed={seed}")]
        assert len(set(train)) == 200 and not held_out & set(train)
    assert prompts("reasoning_gym:sums?size=9&seed=3") == prompts("reasoning_gym:sums?size=9&seed=3")


def test_settings_reach_the_data_set(library: None) -> None:
    text = prompts("reasoning_gym:sums?size=1&terms=4")[0].text
    assert text.splitlines()[0].count("+") == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:sum", "reasoning_gym:sum: no such data set; there are countdown, sums"),
        ("reasoning_gym:word_ladder", "cannot be used: the library makes other problems in every process"),
        ("reasoning_gym:sums?terms=1", "refuses the settings .*terms must be at least 2"),
        ("reasoning_gym:sums?words=1", "refuses the settings .*words"),
        ("reasoning_gym:sums?size=none", "size 'none' is not a positive integer"),
        ("reasoning_gym:sums?split=dev", "split 'dev' is not one of train, test"),
        ("reasoning_gym:sums?seed", "'seed' must be option=value"),
        ("reasoning_gym:sums?seed=1&seed=2", "each option once"),
        ("reasoning_gym:sums?seed=[", r"'\[' of option seed is not YAML"),
        ("reasoning_gym:sums?size=900&split=test", r"has only \d+ different test problems"),
    ],
)
def test_a_wrong_source_is_refused(library: None, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompts(source)


def test_training_and_evaluation_need_their_splits(library: None) -> None:
    train, test = named_source("reasoning_gym:sums"), named_source("reasoning_gym:sums?split=test")
    assert train and test
    check_named(train, held_out=False)
    check_named(test, held_out=True)
    with pytest.raises(UserError, match="held-out problems need split=test"):
        check_named(train, held_out=True)
    with pytest.raises(UserError, match=r"use it in prompts\.test only"):
        check_named(test, held_out=False)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^reasoning_gym:sums needs a package .*pip install reasoning-gym$"):
        prompts("reasoning_gym:sums")


def test_only_the_full_score_is_right(library: None) -> None:
    (prompt,) = prompts("reasoning_gym:sums?size=1")
    right = json.loads(prompt.answer)["answer"]
    assert judge(prompt, f"<answer>3</answer> no: <answer> {right} </answer>") == "correct"
    assert judge(prompt, rf"so \boxed{{{right}}}") == "correct"
    assert judge(prompt, f"<answer>{int(right) + 1}</answer>") == "wrong: score 0.5"
    assert judge(prompt, f"<think><answer>{right}</answer></think> I do not know") == "no answer"


def test_a_problem_of_another_version_is_an_error(library: None) -> None:
    (prompt,) = prompts("reasoning_gym:sums?size=1")
    other = json.dumps(json.loads(prompt.answer) | {"answer": "-1"})
    with pytest.raises(ValueError, match="another one in the installed version"):
        reasoning_gym.score(other, "-1")
    with pytest.raises(ValueError, match="names its data set"):
        reasoning_gym.score("7", "7")


@pytest.mark.parametrize(
    "answer",
    [
        *("__import__('os').system('x')", "exit()", "(exit)()", "[exit][0]()", "().x", "f'{exit()}'", "'' .join(x)"),
        *("1 .real", "е()", "open('x')", "(lambda: 0)()", "print\n(1)"),
    ],
)
def test_an_answer_cannot_run_code(library: None, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(Sums, "score_answer", lambda self, answer, entry: 1.0)
    (prompt,) = prompts("reasoning_gym:countdown?size=1")
    assert judge(prompt, f"<answer>{answer}</answer>") == "wrong: score 0"


@pytest.mark.parametrize("answer", ["(1 + 2)*3/4.5", "x**2*exp(2*x) + sin(x)/2 + C", "[['Q', 'E'], [0, .5]]"])
def test_an_answer_that_only_computes_is_scored(library: None, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(Sums, "score_answer", lambda self, answer, entry: 1.0)
    (prompt,) = prompts("reasoning_gym:countdown?size=1")
    assert judge(prompt, f"<answer>{answer}</answer>") == "correct"


@pytest.mark.parametrize("dataset", ["gsm_symbolic", "countdown", "maze"])
def test_the_real_library_accepts_its_own_answers(dataset: str) -> None:
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    made = prompts(f"reasoning_gym:{dataset}?size=2&seed=1")
    rollouts = [
        Rollout(prompt, 0, 0, (1,), f"<answer>{answer}</answer>", (), "stop", 0)
        for prompt in made
        for answer in (json.loads(prompt.answer)["answer"], "31 * 17")
    ]
    with Scorer(1) as scorer:
        assert [r.verdict.partition(":")[0] for r in scorer.score(rollouts)] == ["correct", "wrong"] * 2


def test_data_sets_that_evaluate_answers_are_known() -> None:
    """If a new version has others, ``EVALUATING`` must name them."""
    package = pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    from reasoning_gym.factory import DATASETS

    found = {
        name
        for name, (dataset, _) in DATASETS.items()
        if re.search(r"eval\(.*answer|parse_expr\(.*answer|exec\(.*answer", Path(source_of(dataset)).read_text())
    }
    assert package and found - {"number_sorting", "propositional_logic"} <= reasoning_gym.EVALUATING


def source_of(dataset: type) -> str:
    file = sys.modules[dataset.__module__].__file__
    assert file
    return file
