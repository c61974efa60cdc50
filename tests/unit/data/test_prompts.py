"""The prompt stream: what it reads, what it refuses, and that a resume neither repeats nor skips."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcppo.data.prompts import PromptKeys, PromptStream, load_prompts
from megatron_vcppo.errors import UserError
from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.registry import VERIFIERS
from megatron_vcppo.rewards.verifier import UNJUDGED
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()


def write_rows(path: Path, rows: list[dict | str]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_prompts_are_read_as_text_or_chat(tmp_path: Path) -> None:
    rows: list[dict | str] = [
        {"question": "3 #1 +4 ?", "target": "7", "task": "running_sum"},
        {"question": [{"role": "user", "content": "3 #1 +4 ?"}], "target": 7},
        {"question": "1 ?", "target": {"tests": ["assert f(1) == 1"]}, "task": "code"},
    ]
    keys = PromptKeys(prompt="question", answer="target", default_task="math")
    prompts, report = load_prompts(write_rows(tmp_path / "p.jsonl", rows), TOKENIZER, 50, keys=keys)
    ids = tuple(TOKENIZER.convert_tokens_to_ids(["<bos>", "3", "#1", "+4", "?"]))
    assert prompts[0] == Prompt("p:1", ids, "3 #1 +4 ?", "7", "running_sum")
    assert prompts[1].token_ids == ids and prompts[1].answer == "7" and prompts[1].task == "math"
    assert json.loads(prompts[2].answer) == rows[2]["target"]  # type: ignore[index]
    assert report.num_used == 3


def test_prompts_that_no_verifier_judges_need_no_answer(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "p.jsonl", [{"prompt": "3 ?"}, {"prompt": "3 ?", "answer": 7}])
    keys = PromptKeys(default_task=UNJUDGED)
    prompts, _ = load_prompts(source, TOKENIZER, 50, keys=keys, known_tasks=VERIFIERS)
    assert [(prompt.answer, prompt.task) for prompt in prompts] == [("", UNJUDGED), ("7", UNJUDGED)]
    verdict = VERIFIERS[UNJUDGED](prompts[0], "anything")
    assert (verdict.reward, verdict.verdict) == (0.0, "not judged")


def test_bad_prompts_are_counted_and_named(tmp_path: Path) -> None:
    good = {"prompt": "3 ?", "answer": "3", "task": "math"}
    rows: list[dict | str] = [
        good,
        "nonsense",
        {"prompt": "3 ?", "task": "math"},
        {**good, "task": "poetry"},
        {**good, "prompt": "1 " * 50},
        {**good, "prompt": " "},
        {**good, "prompt": 3},
        {"prompt": "3 ?", "answer": "3"},
    ]
    source = write_rows(tmp_path / "p.jsonl", rows)
    for policy in ("skip", "truncate"):
        prompts, report = load_prompts(source, TOKENIZER, 20, policy, known_tasks={"math", "code"})
        assert [prompt.prompt_id for prompt in prompts] == ["p:1"]
        assert report.problems == {
            "malformed": [2],
            "missing key": [3, 8],
            "unknown task": [4],
            "empty prompt": [6],
            "wrong type": [7],
            "too long": [5],
        }
    with pytest.raises(UserError, match="7 bad samples"):
        load_prompts(source, TOKENIZER, 20, known_tasks={"math", "code"})
    with pytest.raises(UserError, match="no usable sample"):
        load_prompts(write_rows(tmp_path / "none.jsonl", ["x"]), TOKENIZER, 20, "skip")
    with pytest.raises(UserError, match="prompts: no samples"):
        PromptStream([], seed=0)


@given(st.integers(1, 25), st.lists(st.integers(1, 12), min_size=1, max_size=10), st.data())
@settings(max_examples=50, deadline=None)
def test_resumes_neither_repeat_nor_skip(num_prompts: int, sizes: list[int], data: st.DataObject) -> None:
    prompts = [Prompt(f"p:{i}", (1,), "x", "y", "math") for i in range(num_prompts)]
    whole = PromptStream(prompts, seed=1)
    expected = [whole.next(size) for size in sizes]
    stream = PromptStream(prompts, seed=1)
    got = []
    for size in sizes:
        if data.draw(st.booleans()):  # a crash after the checkpoint: what came after it is drawn again
            state = json.loads(json.dumps(stream.state_dict()))
            stream.next(size)
            stream = PromptStream(prompts, seed=1)
            stream.load_state_dict(state)
        got.append(stream.next(size))
    assert got == expected
    ids = [prompt.prompt_id for batch in got for prompt in batch]
    assert len(set(ids)) == len(ids)
    for epoch in range(stream.epoch):
        assert {i for i in ids if i.endswith(f"@{epoch}")} == {f"p:{i}@{epoch}" for i in range(num_prompts)}
