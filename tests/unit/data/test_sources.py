"""Files as people have them: every kind of file, every published form of rows, and names that cannot be reached."""

import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from datasets import Dataset

from megatron_vcppo.data import readers
from megatron_vcppo.data.bad_samples import BadSample
from megatron_vcppo.data.fields import answer_text, find, require
from megatron_vcppo.data.prompts import PromptKeys, load_prompts
from megatron_vcppo.data.readers import Sample, read_samples, sample_name
from megatron_vcppo.data.sft_dataset import SftKeys, load_sft_dataset
from megatron_vcppo.errors import UserError
from megatron_vcppo.tasks.word_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
ROWS = [{"prompt": f"{i} ?", "answer": i, "note": None} for i in range(5)]

DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"content": "3 #1 +4 ?", "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "7", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "3 #1 +4 ?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "7"},
    "extra_info": {"split": "train", "index": 0, "answer": "#### 7", "question": "3 #1 +4 ?"},
}
ORZ: list[dict[str, Any]] = [
    {"from": "human", "value": "3 #1 +4 ?"},
    {"from": "assistant", "ground_truth": {"value": "7", "pass_at_n": 0.5}},
]
OPEN_R1 = {
    "problem": "3 #1 +4 ?",
    "solution": "<think> #1 +4 7 </think> = 7",
    "answer": "7",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "source": "olympiads",
    "uuid": "x",
    "is_reasoning_complete": [True, True],
    "generations": ["<think> #1 +4 7 </think> = 7", "<think> 7 </think> = 7"],
    "correctness_math_verify": [True, True],
    "correctness_llama": None,
    "finish_reasons": ["stop", "stop"],
    "correctness_count": 2,
    "messages": [
        {"role": "user", "content": "3 #1 +4 ?"},
        {"role": "assistant", "content": "<think> #1 +4 7 </think> = 7"},
    ],
}
ORZ_TABLE = {"0": {**ORZ[0], "ground_truth": None}, "1": {**ORZ[1], "value": None}}
"""The same as a table: the places of the list are its columns."""
DAPO_PROCESSED = {
    "prompt": "3 #1 +4 ?",
    "solution": "7",
    "data_source": "math_dapo",
    "source_prompt": DAPO["prompt"],
    "ability": "MATH",
    "reward_model": DAPO["reward_model"],
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
SCHEMAS = {
    "dapo_processed": (DAPO_PROCESSED, PromptKeys("prompt", "solution", default_task="math")),
    "orz_table": (ORZ_TABLE, PromptKeys("0.value", "1.ground_truth.value", default_task="math")),
    "dapo": (DAPO, PromptKeys("prompt", "reward_model.ground_truth", default_task="math")),
    "verl": (VERL, PromptKeys("prompt", "reward_model.ground_truth", "ability")),
    "orz": (ORZ, PromptKeys("0.value", "1.ground_truth.value", default_task="math")),
    "open_r1": (OPEN_R1, PromptKeys("problem", "answer", default_task="math")),
}
ANY = PromptKeys("prompt | 0.value | problem", "reward_model.ground_truth | 1.ground_truth.value | answer", "", "math")


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", lines(ROWS)),
        ("t.json", lines(ROWS)),
        ("array.json", json.dumps(ROWS, indent=1).encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(ROWS).replace(b"\n", b"\r\n")),
        ("t.jsonl.gz", gzip.compress(lines(ROWS))),
        ("t.jsonl.zst", zstandard.compress(lines(ROWS))),
        ("array.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("array.json.zst", zstandard.compress(json.dumps(ROWS).encode())),
    ],
)
def test_every_kind_of_json_file_holds_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    samples = list(read_samples(str(tmp_path / name)))
    assert [sample.value for sample in samples] == ROWS
    assert [sample.number for sample in samples] == [1, 2, 3, 4, 5] and samples[-1].fraction == 1.0
    assert sample_name(name, 3) == f"{name}:3"


def test_a_folder_of_parquet_files_as_it_is_downloaded_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "copy" / "data").mkdir(parents=True)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "copy" / "data" / "train-00000-of-00001.parquet")
    assert [sample.value for sample in read_samples(str(tmp_path / "copy"))] == ROWS


def test_several_frames_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(ROWS[:2])) + zstandard.compress(lines(ROWS[2:])))
    assert [sample.value for sample in read_samples(str(tmp_path / "a.jsonl.zst"))] == ROWS


def test_a_damaged_compressed_file_costs_one_line(tmp_path: Path) -> None:
    for name, content in (("a.jsonl.gz", gzip.compress(lines(ROWS))), ("a.jsonl.zst", zstandard.compress(lines(ROWS)))):
        for damaged in (content[: len(content) // 2], b"plain text"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name}: cannot be decompressed"):
                list(read_samples(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_that_fills_the_memory_costs_one_line(name: str, tmp_path: Path) -> None:
    """After a good one, 300 MiB without an end."""
    path, block = tmp_path / name, b"0" * (1 << 20)
    with gzip.open(path, "wb", 1) if name.endswith(".gz") else zstandard.open(path, "wb") as file:
        file.write(lines(ROWS[:1]))
        for _ in range(300):
            file.write(block)
    tracemalloc.start()
    with pytest.raises(UserError, match=f"{name}:2: a line of more than 64 MiB"):
        list(read_samples(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 290 << 20


def test_an_array_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(ROWS * 20_000).encode()))
    assert len(list(read_samples(str(path)))) == 20_000 * len(ROWS)
    monkeypatch.setattr(readers, "_LARGEST_ARRAY", 1 << 16)
    with pytest.raises(UserError, match=r"a\.json\.gz: a JSON array of more than"):
        list(read_samples(str(path)))


@pytest.mark.parametrize(
    ("schema", "kind"),
    # A table has no rows that are lists.
    [(s, k) for s in SCHEMAS for k in ("jsonl", "json", "parquet") if (s, k) != ("orz", "parquet")],
)
def test_published_rows_work_by_naming_keys(tmp_path: Path, schema: str, kind: str) -> None:
    row, keys = SCHEMAS[schema]
    path = tmp_path / f"p.{kind}"
    if kind == "parquet":
        Dataset.from_list([row, row]).to_parquet(path)
    else:
        path.write_bytes(lines([row, row]) if kind == "jsonl" else json.dumps([row, row]).encode())
    for chosen in (keys, ANY):
        prompts, _ = load_prompts(str(path), TOKENIZER, 50, keys=chosen)
        assert len(prompts) == 2
        for prompt in prompts:
            assert TOKENIZER.decode(prompt.token_ids) == "<bos> 3 #1 +4 ?"
            assert (prompt.answer, prompt.task) == ("7", "math")


def test_published_rows_are_examples_too(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    shared = [{"from": "human", "value": "3 #1 +4 ?"}, {"from": "gpt", "value": OPEN_R1["solution"]}]
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in OPEN_R1["messages"]]  # type: ignore
    path.write_text(json.dumps([OPEN_R1, {"conversations": shared}, {"messages": parts}]))
    dataset, _ = load_sft_dataset(str(path), TOKENIZER, 50, keys=SftKeys(messages="messages | conversations"))
    assert len({(dataset[i].token_ids, dataset[i].fields["loss_mask"]) for i in range(3)}) == 1
    keys = SftKeys("problem", "generations.1", "none")
    assert load_sft_dataset(str(path), TOKENIZER, 50, "skip", keys)[1].num_used == 1


def test_fields() -> None:
    row = {"a": {"b": [{"c": 1}, None]}, "a.b": 2, "x": None, "y": 0}
    assert find(row, "a.b") == 2 and find(row, "a.b.0.c") == 1 and find(row, "a.b.7.c") is None
    assert find(row, "x | y") == 0 and find(row, "q|x") is None
    assert require(Sample(1, row), ["y", "x | y"]) == [0, 0]
    kinds = {"x": "null", "q": "missing key", "q | x": "null", "y.z": "missing key"}
    for key, kind in kinds.items():
        with pytest.raises(BadSample) as caught:
            require(Sample(1, row), [key])
        assert caught.value.kind == kind and repr(key) in caught.value.detail


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (7.0, "7"), (-0.5, "-0.5"), (1e-7, "0.0000001"), (1e22, "1" + "0" * 22), (True, "true"), ([1], "[1]")],
)
def test_numbers_are_answers(value: object, text: str) -> None:
    assert answer_text(value, "answer") == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), " ", b"x", {1, 2}])
def test_what_is_no_answer_is_refused(value: object) -> None:
    with pytest.raises(BadSample, match="malformed answer: 'answer' is"):
        answer_text(value, "answer")


def test_a_name_fails_at_once_where_there_is_no_network(tmp_path: Path) -> None:
    """The limit is far above what imports cost; asking the hub again and again would take longer."""
    program = "from megatron_vcppo.data.readers import check_source; check_source('nobody/nothing')"
    silent = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    found = subprocess.run([sys.executable, "-c", program], env=silent, capture_output=True, text=True, timeout=20)
    last = found.stderr.strip().splitlines()[-1]
    assert "UserError: cannot read the data set nobody/nothing" in last and "127.0.0.1:9 does not answer" in last
    assert "Retrying" not in found.stderr
