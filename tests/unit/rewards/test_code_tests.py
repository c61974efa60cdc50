"""The forms in which data sets have tests, and what is refused when they are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import CodeRewardConfig
from megatron_vcppo.data.prompts import load_prompts
from megatron_vcppo.errors import UserError
from megatron_vcppo.rewards.code_compare import CHECKERS
from megatron_vcppo.rewards.code_tests import AssertTests, CallTests, OutputTests, parse_tests
from megatron_vcppo.rewards.registry import check_answer, isolation_of_code, resolve_verifiers
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer

PRINTED = OutputTests(["1 2\n"], ["3\n"], "tokens")
CALLED = CallTests("f", [[1, [2]], [3, []]], [3, [4]])


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        ({"inputs": ["1 2\n"], "outputs": ["3\n"]}, PRINTED),
        ({"inputs": ["1 2\r\n"], "outputs": [["3", ""]]}, PRINTED),
        ([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}], PRINTED),
        ({"tests": [{"input": "1 2\n", "output": "3\n"}]}, PRINTED),
        ({"inputs": ["x"], "outputs": ["y"], "checker": "exact"}, OutputTests(["x"], ["y"], "exact")),
        ({"fn_name": "f", "inputs": [[1, [2]], [3, []]], "outputs": [3, [4]]}, CALLED),
        ({"fn_name": "f", "inputs": [[1, [2]], [3, []]], "outputs": [[3], [[4]]]}, CALLED),
        ({"fn_name": "f", "inputs": ["1\n[2]", "3\n[]\n"], "outputs": ["3", "[4]"]}, CALLED),
        ({"asserts": ["assert f(1) == 2"]}, AssertTests(["assert f(1) == 2"], "")),
        (["assert f(1) == 2"], AssertTests(["assert f(1) == 2"], "")),
        ({"tests": ["assert f(1) == 2"]}, AssertTests(["assert f(1) == 2"], "")),
        ({"asserts": "assert f(x)", "setup": "x = 1"}, AssertTests(["assert f(x)"], "x = 1")),
        ({"asserts": "def check(c):\n    assert c(1)\ncheck(f)"},
         AssertTests(["def check(c):\n    assert c(1)\ncheck(f)"], "")),
    ],
)  # fmt: skip
def test_forms(answer: Any, tests: object) -> None:
    assert parse_tests(json.dumps(answer), CHECKERS) == tests


MALFORMED = {
    "nonsense": "must be JSON",
    "3": "must be a JSON object or list, not int",
    "[" * 100_000: "must be JSON",
    "{}": "needs asserts, or inputs and outputs",
    "[]": "needs asserts, or inputs and outputs",
    '{"inputs": [], "outputs": []}': "at least one entry",
    '{"inputs": ["1"], "outputs": []}': "1 inputs and 0 outputs",
    '{"inputs": [[1]], "outputs": ["1"]}': "without fn_name, inputs and outputs are text, not list",
    '{"inputs": ["1"], "outputs": ["1"], "checker": "mine"}': "no checker 'mine'; there are exact, ignore_case",
    '{"fn_name": "f(", "inputs": [[1]], "outputs": [1]}': "fn_name 'f(' is no name",
    '{"fn_name": "f", "inputs": [1], "outputs": [1]}': "each input is a list of arguments, not int",
    '{"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}': "with fn_name, input 'x' must be JSON",
    '{"asserts": ["assert f(1) =="]}': "not Python: 'assert f(1) =='",
    '{"asserts": [1]}': "asserts and setup must be text",
    '{"asserts": "def test_f():\\n    assert f(1) == 2"}': "only define things",
    '[{"input": "1"}]': "objects with input and output",
}


@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: answer[:40])
def test_malformed_tests_are_refused(answer: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_tests(answer, CHECKERS)
    assert MALFORMED[answer] in str(error.value) and "\n" not in str(error.value)


def test_malformed_tests_are_refused_when_the_data_are_read(tmp_path: Path) -> None:
    good = {"prompt": "3 ?", "answer": {"inputs": ["1"], "outputs": ["1"]}, "task": "apps"}
    rows = [good, {**good, "answer": {"inputs": ["1"]}}, {**good, "answer": "7", "task": "math"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verifiers = resolve_verifiers({"apps": "code"})

    def check(task: str, answer: str) -> None:
        check_answer(verifiers, task, answer)

    source, tokenizer = str(tmp_path / "p.jsonl"), build_tokenizer()
    prompts, report = load_prompts(source, tokenizer, 20, "skip", known_tasks=verifiers, check_answer=check)
    assert [p.task for p in prompts] == ["apps", "math"] and report.problems == {"malformed answer": [2]}
    with pytest.raises(UserError, match=r"p.jsonl:2: malformed answer: 'answer': a code answer needs asserts"):
        load_prompts(source, tokenizer, 20, known_tasks=verifiers, check_answer=check)
    assert isolation_of_code(verifiers, {"math"}) == ""
    assert isolation_of_code(verifiers, {"math", "apps"}) in ("bubblewrap", "namespaces", "landlock")
    assert isolation_of_code(resolve_verifiers({}, CodeRewardConfig(isolation="none")), {"code"}) == "none"


def test_checkers_of_the_users_own() -> None:
    verifiers = resolve_verifiers({}, CodeRewardConfig(checkers={"mine": "operator:contains"}))
    check_answer(verifiers, "code", '{"inputs": ["1"], "outputs": ["1"], "checker": "mine"}')
    for where, problem in (("operator", "must be module:function"), ("nowhere:f", "cannot import nowhere:f")):
        with pytest.raises(UserError, match=f"rewards.code.checkers.mine: .*{problem}"):
            resolve_verifiers({}, CodeRewardConfig(checkers={"mine": where}))
