"""The tests of a programming problem: read from the prompt's answer, and checked when the data are read."""

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OutputTests:
    """The program reads standard input; what it prints is compared."""

    inputs: list[str]
    outputs: list[str]
    checker: str


@dataclass(frozen=True)
class CallTests:
    """One function is called with lists of arguments; what it returns is compared."""

    fn_name: str
    inputs: list[list[Any]]
    outputs: list[Any]


@dataclass(frozen=True)
class AssertTests:
    """Statements that raise if the program is wrong. setup is executed before the program."""

    statements: list[str]
    setup: str


Tests = OutputTests | CallTests | AssertTests


def parse_tests(answer: str, checkers: Collection[str]) -> Tests:
    """Read an answer, which is JSON in one of these forms; others raise ValueError with what is wrong.

    - ``{"inputs": [text, …], "outputs": [text, …]}``, with ``"checker": name`` if tokens are not to be compared;
    - ``{"fn_name": name, "inputs": [[argument, …], …], "outputs": [value, …]}`` as in APPS and TACO, or with each input
      as text, a line of JSON for each argument, and each output as the text of its JSON, as in LiveCodeBench;
    - ``[{"input": …, "output": …}, …]`` in place of the two lists;
    - ``{"asserts": [statement, …] or text, "setup": text}``, or the list of statements itself.
    """
    try:
        data = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a code answer must be JSON: {error}") from None
    if isinstance(data, list):
        data = {"tests": data}
    if not isinstance(data, dict):
        raise ValueError(f"a code answer must be a JSON object or list, not {type(data).__name__}")
    if isinstance(pairs := data.get("tests"), list):
        data = {**data, **_lists(pairs)}
    if asserts := data.get("asserts"):
        return _assert_tests(asserts, data.get("setup") or "")
    inputs, outputs = data.get("inputs"), data.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise ValueError("a code answer needs asserts, or inputs and outputs, which are lists with at least one entry")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    if fn_name := data.get("fn_name"):
        return _call_tests(fn_name, inputs, outputs)
    checker = data.get("checker", "tokens")
    if checker not in checkers:
        raise ValueError(f"no checker {checker!r}; there are {', '.join(sorted(checkers))}: see rewards.code.checkers")
    return OutputTests([_text(item) for item in inputs], [_text(item) for item in outputs], checker)


def _lists(pairs: list[Any]) -> dict[str, Any]:
    if pairs and all(isinstance(pair, str) for pair in pairs):
        return {"asserts": pairs}
    if not all(isinstance(pair, dict) and {"input", "output"} <= set(pair) for pair in pairs):
        raise ValueError("tests must be statements, or objects with input and output")
    return {"inputs": [pair["input"] for pair in pairs], "outputs": [pair["output"] for pair in pairs]}


def _text(item: Any) -> str:
    """Standard input or output; some data sets have it as a list of lines."""
    if isinstance(item, list) and all(isinstance(line, str) for line in item):
        item = "\n".join(item)
    if not isinstance(item, str):
        raise ValueError(f"without fn_name, inputs and outputs are text, not {type(item).__name__}")
    return item.replace("\r\n", "\n")


def _call_tests(fn_name: Any, inputs: list[Any], outputs: list[Any]) -> CallTests:
    if not isinstance(fn_name, str) or not fn_name.isidentifier():
        raise ValueError(f"fn_name {fn_name!r} is no name of a function")
    if all(isinstance(item, str) for item in [*inputs, *outputs]):
        arguments = [[_json(line, "input") for line in text.split("\n") if line.strip()] for text in inputs]
        return CallTests(fn_name, arguments, [_json(text, "output") for text in outputs])
    for item in inputs:
        if not isinstance(item, list):
            raise ValueError(f"with fn_name each input is a list of arguments, not {type(item).__name__}")
    # APPS wraps each result in its own list; only if all are is it a wrapping.
    if all(isinstance(item, list) and len(item) == 1 for item in outputs):
        outputs = [item[0] for item in outputs]
    return CallTests(fn_name, inputs, outputs)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"with fn_name, {what} {text[:40]!r} must be JSON") from None


def _assert_tests(asserts: Any, setup: Any) -> AssertTests:
    statements = asserts if isinstance(asserts, list) else [asserts]
    if not all(isinstance(text, str) for text in statements) or not isinstance(setup, str):
        raise ValueError("asserts and setup must be text")
    for text in [*statements, setup]:
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"not Python: {text[:60]!r}: {error}") from None
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    body = [node for text in statements for node in ast.parse(text).body]
    if all(isinstance(node, definitions) for node in body):
        raise ValueError("asserts only define things: nothing is tested")
    return AssertTests(statements, setup)
