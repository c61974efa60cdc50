"""Benchmarks by name: small files in the schemas of the published ones, read, and judged by their verifiers."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.data.benchmarks import pickled_text
from megatron_vcppo.data.prompts import PromptKeys, load_prompts
from megatron_vcppo.errors import UserError
from megatron_vcppo.launch.checks import check_inputs
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.choice import listed_options
from megatron_vcppo.rewards.code_tests import CallTests, OutputTests, parse_tests
from megatron_vcppo.rewards.registry import VERIFIERS
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer
from tools.benchmarks._tiny_chains import tiny_config

TOKENIZER = build_tokenizer()


def read(source: str, on_bad_sample: str = "error") -> list[Prompt]:
    keys = PromptKeys(prompt="of", answer="other", task="data")
    return load_prompts(source, TOKENIZER, 10_000, on_bad_sample, keys, VERIFIERS)[0]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(prompt: Prompt, response: str) -> str:
    return VERIFIERS[prompt.task](prompt, response).verdict.partition(":")[0]


AIME_2024 = {"id": 60, "problem": "Every morning?", "solution": "…", "answer": "033", "url": "…", "year": "2024"}
AIME_2025 = {"question": "Find the angle.", "answer": "336^\\circ"}
MATH_500 = {
    **{"problem": "Convert $(0,3)$ to polar coordinates.", "solution": "…", "subject": "Precalculus", "level": 2},
    **{"answer": r"\left( 3, \frac{\pi}{2} \right)", "unique_id": "test/precalculus/807.json"},
}


@pytest.mark.parametrize(
    ("name", "row", "right", "wrong"),
    [
        ("aime_2024", AIME_2024, "33", "330"),
        ("aime_2024", {"ID": "2024-I-1", "Problem": "x?", "Solution": "…", "Answer": 204}, "204", "2"),
        ("aime_2025", AIME_2025, "336", "36"),
        ("math_500", MATH_500, r"(3, \pi/2)", "(3, 2)"),
    ],
)
def test_mathematics(tmp_path: Path, name: str, row: dict[str, Any], right: str, wrong: str) -> None:
    (prompt,) = read(f"{name}:{jsonl(tmp_path / 'x.jsonl', [row])}")
    assert prompt.prompt_id == "x:1" and prompt.task == "math" and prompt.text.count("boxed") == 1
    assert judge(prompt, rf"so \boxed{{{right}}}") == "correct" and judge(prompt, rf"\boxed{{{wrong}}}") == "wrong"


def test_a_parquet_file_of_a_benchmark(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([AIME_2024] * 3).to_parquet(str(tmp_path / "train.parquet"))
    assert len(read(f"aime_2024:{tmp_path / 'train.parquet'}")) == 3


def gpqa_file(path: Path, count: int) -> Path:
    columns = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)), "Subdomain"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for number in range(count):
            answers = [f"choice {number}.{i},\nsecond line" for i in range(4)]
            writer.writerow(dict(zip(columns, [f"rec{number}", f'Why, "{number}"?', *answers, "Physics"])))
    return path


def test_choices_are_shuffled_by_the_seed_and_the_question(tmp_path: Path) -> None:
    path = gpqa_file(tmp_path / "gpqa_diamond.csv", 60)
    prompts = read(f"gpqa_diamond:{path}")
    assert prompts[0].prompt_id == "gpqa_diamond:0" and set("".join(p.answer for p in prompts)) == set("ABCD")
    for number, prompt in enumerate(prompts):
        options = listed_options(prompt.text)
        assert options[prompt.answer] == f"choice {number}.0, second line" and len(options) == 4
        assert judge(prompt, rf"\boxed{{{prompt.answer}}}") == "correct"
    assert prompts == read(f"gpqa_diamond:{path}?seed=0") != read(f"gpqa_diamond:{path}?seed=1")
    alone = gpqa_file(tmp_path / "gpqa_diamond.csv", 1)
    assert read(f"gpqa_diamond:{alone}") == prompts[:1]


def packed(text: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(text))).decode()


def lcb(private: str, day: str = "2024-09-01T00:00:00", name: str | None = None) -> dict[str, Any]:
    public = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional" if name else "stdin"}]
    return {
        **{"question_title": "t", "question_content": "Add.", "platform": "leetcode", "contest_date": day},
        **{"starter_code": "class Solution:\n    def add(self, a, b):" if name else "", "difficulty": "easy"},
        **{"public_test_cases": json.dumps(public), "private_test_cases": private},
        "metadata": json.dumps({"func_name": name} if name else {}),
    }


def test_livecodebench_has_public_and_private_tests(tmp_path: Path) -> None:
    hidden = json.dumps([{"input": "[4]\n1", "output": "5", "testtype": "functional"}])
    rows = [lcb(packed(hidden), name="add"), lcb(hidden), lcb(packed(hidden + " " * 70_000))]
    called, printed, long = read(f"livecodebench:{jsonl(tmp_path / 'test.jsonl', rows)}")
    tests = parse_tests(called.answer, {"tokens"})
    assert tests == CallTests("add", [[[1, 2], 3], [[4], 1]], [6, 5]) and "class Solution" in called.text
    assert parse_tests(printed.answer, {"tokens"}) == OutputTests(["[1, 2]\n3", "[4]\n1"], ["6", "5"], "tokens")
    assert "standard input" in printed.text and long.answer == printed.answer


def test_livecodebench_by_the_days_of_contests(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [lcb("[]", f"2024-0{month}-01T00:00:00") for month in range(1, 10)])
    found = read(f"livecodebench:{path}?start=2024-03-01&end=2024-05-01")
    assert [prompt.prompt_id for prompt in found] == ["x:3", "x:4", "x:5"]


class Attack:
    def __reduce__(self) -> Any:
        return eval, ("1/0",)


@pytest.mark.parametrize("content", [Attack(), ["a"], b"x", 3, ("a", "b")])
def test_a_pickle_is_read_and_never_executed(tmp_path: Path, content: object) -> None:
    for protocol in (0, 2, 5):
        with pytest.raises(ValueError, match="pickle with"):
            pickled_text(pickle.dumps(content, protocol))
    with pytest.raises(UserError, match=r"malformed.*pickle with"):
        read(f"livecodebench:{jsonl(tmp_path / 'x.jsonl', [lcb(packed(content))])}")


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickled_text_is_read(protocol: int) -> None:
    for text in ("", "[1]", "ü" * 300, "x" * 70_000):
        assert pickled_text(pickle.dumps(text, protocol)) == text


CODEFORCES: dict[str, Any] = {
    **{"id": "1/A", "title": "Theatre Square", "description": "Pave it.", "input_format": "Three numbers."},
    **{"output_format": "One number.", "interaction_format": None, "note": None, "input_mode": "stdio"},
    **{"examples": [{"input": "6 6 4", "output": "4"}], "generated_checker": None, "time_limit": 1.0},
    "official_tests": [{"input": "6 6 4", "output": "4"}, {"input": "1 1 1", "output": "1"}],
}


def test_codeforces_and_what_it_leaves_out(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"interaction_format": "Ask."},
        {"input_mode": "file"},
        {"generated_checker": "print(1)"},
        {"official_tests": []},
    ]
    source = f"codeforces:{jsonl(tmp_path / 'x.jsonl', [CODEFORCES, *(CODEFORCES | other for other in others)])}"
    (prompt,) = read(source, "skip")
    assert parse_tests(prompt.answer, {"tokens"}) == OutputTests(["6 6 4", "1 1 1"], ["4", "1"], "tokens")
    assert "Theatre Square" in prompt.text and "Example input\n6 6 4" in prompt.text and "Note" not in prompt.text
    with pytest.raises(
        UserError, match=r"interactive problem(?s:.*)files(?s:.*)several correct outputs(?s:.*)no official"
    ):
        read(source)


def test_other_rows_and_options_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"text": "?"}])
    with pytest.raises(UserError, match=r"x\.jsonl:1: malformed: no 'question'; it has text"):
        read(f"math_500:{path}")
    with pytest.raises(UserError, match="malformed: not a row of livecodebench"):
        row = lcb(json.dumps([1]))
        read(f"livecodebench:{jsonl(tmp_path / 'z.jsonl', [row])}")
    with pytest.raises(UserError, match="malformed: no 'public_test_cases'"):
        read(f"livecodebench:{jsonl(tmp_path / 'y.jsonl', [{'question_content': 'x'}])}")
    with pytest.raises(UserError, match="math_500 has no options, not seed"):
        read(f"math_500:{path}?seed=1")
    with pytest.raises(UserError, match="gpqa_diamond has the options seed, not size"):
        read(f"gpqa_diamond:{path}?size=1")


def test_a_csv_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"Question,Correct Answer\n\xff,b\n")
    with pytest.raises(UserError, match=r"x\.csv: cannot be read as CSV in UTF-8: "):
        read(f"gpqa_diamond:{tmp_path / 'x.csv'}")


def test_a_missing_file_is_seen_before_anything_is_queued(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run")
    config.prompts.test = f"aime_2024:{tmp_path}/none.jsonl"
    with pytest.raises(UserError, match=r"prompts\.test: .*/none\.jsonl does not exist"):
        check_inputs(config, ["evaluate"])
    jsonl(tmp_path / "none.jsonl", [AIME_2024])
    check_inputs(config, ["evaluate"])
    config.prompts.train = "reasoning_gym:gsm_symbolic?split=test"
    with pytest.raises(UserError, match=r"^prompts\.train: reasoning_gym:gsm_symbolic"):
        check_inputs(config, ["evaluate"])
