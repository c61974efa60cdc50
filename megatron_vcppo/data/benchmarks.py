"""The field's benchmarks, as their published files have them, as prompts with an answer that a verifier can judge.

Each function takes one row of the file and the options of the source, and returns prompt, answer and task, or None for
a row that the options leave out. It raises ValueError for a row that cannot be judged. Files are never downloaded here.
"""

import base64
import json
import pickletools
import zlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

Row = Mapping[str, Any]
Problem = dict[str, str]
BOXED = "Put your final answer within \\boxed{}."
LETTER = "Put the letter of the correct option within \\boxed{}."
PROGRAM = "Write a Python program that reads standard input and prints to standard output, in one ```python block."
FUNCTION = "Complete this code, in one ```python block:"
_FORMATS = {"Input": "input_format", "Output": "output_format"}
_LARGEST_TESTS = 1 << 30  # bytes of one problem, decompressed
_PLAIN_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_TEXT_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}


def math_problem(row: Row, options: Mapping[str, Any]) -> Problem:
    """AIME and MATH-500: ``problem`` or ``question``, and ``answer``, whatever their case."""
    lower = {key.lower(): value for key, value in row.items()}
    problem = _text(lower, "problem" if lower.get("problem") is not None else "question")
    return {"prompt": f"{problem}\n\n{BOXED}", "answer": _text(lower, "answer"), "task": "math"}


def gpqa(row: Row, options: Mapping[str, Any]) -> Problem:
    """GPQA: the columns Question, Correct Answer and Incorrect Answer 1 to 3.

    options: ``seed`` (0). The order of the choices depends on it and on the question, not on the row's place.
    """
    question = _text(row, "Question")
    columns = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    choices = [" ".join(_text(row, column).split()) for column in columns]
    order = list(range(4))
    Random(f"{options.get('seed', 0)}/{question}").shuffle(order)
    listed = "\n".join(f"{letter}) {choices[i]}" for letter, i in zip("ABCD", order))
    return {
        "prompt": f"{question}\n\n{listed}\n\n{LETTER}",
        "answer": "ABCD"[order.index(0)],
        "task": "multiple_choice",
    }


def livecodebench(row: Row, options: Mapping[str, Any]) -> Problem | None:
    """LiveCodeBench: question_content, starter_code, public_test_cases, private_test_cases, metadata, contest_date.

    options: ``start`` and ``end``, the first and the last day of contests; None for a problem outside.
    """
    day = str(row.get("contest_date", ""))[:10]
    if ("start" in options and day < str(options["start"])) or ("end" in options and day > str(options["end"])):
        return None
    cases = [*_json(row, "public_test_cases"), *_private_tests(row)]
    tests = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
    if name := _json(row, "metadata").get("func_name"):
        tests["fn_name"] = name
    starter = row.get("starter_code") or ""
    request = f"{FUNCTION}\n```python\n{starter}\n```" if starter else PROGRAM
    return {
        "prompt": f"{_text(row, 'question_content')}\n\n{request}",
        "answer": json.dumps(tests),
        "task": "code",
    }


def codeforces(row: Row, options: Mapping[str, Any]) -> Problem:
    """open-r1/codeforces: the statement in parts, ``examples``, and ``official_tests``.

    Raises ValueError for what comparing printed text cannot judge: interaction, files, several correct outputs.
    """
    if row.get("interaction_format"):
        raise ValueError("an interactive problem")
    if row.get("input_mode") == "file":
        raise ValueError("a problem that reads and writes files")
    if row.get("generated_checker"):
        raise ValueError("a problem with several correct outputs, which only its own checker can judge")
    tests = row.get("official_tests") or []
    if not tests:
        raise ValueError("no official tests")
    parts = [row.get("title") or "", _text(row, "description")]
    parts += [f"{name}\n{row[key]}" for name, key in _FORMATS.items() if row.get(key)]
    for example in row.get("examples") or []:
        parts.append(f"Example input\n{example['input']}\nExample output\n{example['output']}")
    parts += [f"Note\n{row['note']}"] if row.get("note") else []
    return {
        "prompt": "\n\n".join(part for part in [*parts, PROGRAM] if part),
        "answer": json.dumps({"tests": [{"input": test["input"], "output": test["output"]} for test in tests]}),
        "task": "code",
    }


BENCHMARKS: dict[str, Callable[[Row, Mapping[str, Any]], Problem | None]] = {
    **dict.fromkeys(("aime_2024", "aime_2025", "math_500"), math_problem),
    "gpqa_diamond": gpqa,
    "livecodebench": livecodebench,
    "codeforces": codeforces,
}
"""By the name that a source begins with."""
OPTIONS: dict[str, set[str]] = {"gpqa_diamond": {"seed"}, "livecodebench": {"start", "end"}}
"""Benchmark → its options."""


def pickled_text(data: bytes) -> str:
    """The text that a pickle holds, read without executing it. Raises ValueError if it holds anything else."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _TEXT_OPCODES:
            texts.append(str(argument))
        elif opcode.name not in _PLAIN_OPCODES:
            raise ValueError(f"a pickle with {opcode.name}: only one that is a text is read, and none is executed")
    if len(texts) != 1:
        raise ValueError(f"a pickle with {len(texts)} texts in place of one")
    return texts[0]


def _private_tests(row: Row) -> list[Any]:
    """JSON, or that as text in a pickle, compressed by zlib, in base64."""
    text = row.get("private_test_cases") or "[]"
    if not text.lstrip().startswith("["):
        packed = zlib.decompressobj()
        try:
            pickled = packed.decompress(base64.b64decode(text, validate=True), _LARGEST_TESTS)
        except zlib.error as error:
            raise ValueError(f"private_test_cases: {error}") from None
        if packed.unconsumed_tail:
            raise ValueError(f"private_test_cases: more than {_LARGEST_TESTS >> 20} MiB of tests")
        text = pickled_text(pickled)
    return json.loads(text)


def _json(row: Row, key: str) -> Any:
    return json.loads(_text(row, key))


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None or not str(value).strip():
        raise ValueError(f"no {key!r}; it has {', '.join(row) or 'no keys'}")
    return str(value).strip()
