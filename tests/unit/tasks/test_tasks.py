"""The synthetic tasks: exact answers, the intended distribution, held-out test sets, the make-task command."""

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from megatron_vcppo.commands import make_task
from megatron_vcppo.data.sft_dataset import load_sft_dataset
from megatron_vcppo.data.tokenizer import load_tokenizer
from megatron_vcppo.errors import UserError
from megatron_vcppo.tasks.generate import TASKS, demonstration_rows, problems, prompt_rows, split_of
from megatron_vcppo.tasks.task import Style, Task, read_answer
from megatron_vcppo.tasks.word_tokenizer import WORDS, build_tokenizer

PERFECT = Style(mistake_rate=0.0, check_mistake_rate=0.0, quit_early=0.0)
all_tasks = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def solved(task: Task, row: dict[str, str]) -> bool:
    given = read_answer(row["response"])
    return given is not None and task.is_correct(row["prompt"], row["answer"], given)


@all_tasks
def test_writers_without_mistakes_are_right(task: Task) -> None:
    rows = list(demonstration_rows(task, "train", task.default_steps, 0, 200, PERFECT))
    wrong = [row for row in rows if not solved(task, row)]
    # A search may give up at its limit of tries; a chain cannot fail.
    assert len(wrong) <= (10 if task.name == "search" else 0)


@all_tasks
def test_a_solved_answer_is_right_and_a_changed_one_wrong(task: Task) -> None:
    for problem in (task.problem(Random(i), task.default_steps[0]) for i in range(50)):
        assert task.is_correct(problem.prompt, problem.answer, problem.answer)
        for wrong in ("", "x", problem.answer + " 0", problem.answer[:-1] + str((int(problem.answer[-1]) + 1) % 10)):
            assert not task.is_correct(problem.prompt, problem.answer, wrong)


def test_running_sum_matches_an_independent_sum() -> None:
    for row in prompt_rows(TASKS["running_sum"], "train", (1, 64), 1, 300):
        words = row["prompt"].split()
        assert words[-1] == "?" and words[1:-1:2] == [f"#{i + 1}" for i in range(len(words[1:-1]) // 2)]
        assert int(row["answer"]) == (int(words[0]) + sum(map(int, words[2:-1:2]))) % 10


def test_running_sum_has_the_distribution_of_the_known_collapse() -> None:
    """Accuracy, length and accuracy by length of the demonstrations, for the shares and rates that were studied."""
    task = TASKS["running_sum"]
    rows = list(demonstration_rows(task, "train", task.default_steps, 0, 6000))
    lengths = np.array([len(row["response"].split()) + 1 for row in rows])
    correct = np.array([solved(task, row) for row in rows])
    steps = np.array([(len(row["prompt"].split()) - 2) // 2 for row in rows])
    assert set(steps) == set(range(12, 25)) and abs(steps.mean() - 18) < 0.2
    assert lengths.max() <= 200 and abs(lengths.mean() - 93) < 3
    edges = np.quantile(lengths, [0.2, 0.8])
    assert correct[lengths <= edges[0]].mean() < 0.2 and correct[lengths >= edges[1]].mean() > 0.8
    done = np.array([f"#{n}" in row["response"].split() for n, row in zip(steps, rows, strict=True)])
    checked = np.array(["chk" in row["response"].split() for row in rows])
    assert abs(1 - done.mean() - 0.25) < 0.02, "a quarter stops early"
    assert abs((done & ~checked).mean() - 0.15) < 0.015, "15 % never check"
    # Unchecked chains end right only if no mistake survives: measured against the closed form of the error's walk.
    survive = np.mean([0.1 + 0.9 * (1 - 0.2 * 10 / 9) ** n for n in range(12, 25)])
    assert abs(correct[done & ~checked].mean() - survive) < 0.05


@all_tasks
def test_mistakes_are_corrected_by_checks(task: Task) -> None:
    always = Style(check_mistake_rate=0.0, never_check=0.0, half_check=0.0, always_check=1.0, quit_early=0.0)
    never = Style(never_check=1.0, half_check=0.0, always_check=0.0, quit_early=0.0)
    rates = [
        np.mean([solved(task, row) for row in demonstration_rows(task, "train", task.default_steps, 0, 300, style)])
        for style in (always, never)
    ]
    assert rates[0] > 0.95 and rates[1] < (0.75 if task.name == "search" else 0.4)


@all_tasks
def test_words_and_tokens_are_the_same(task: Task) -> None:
    tokenizer = build_tokenizer()
    for row in demonstration_rows(task, "train", task.default_steps, 0, 100):
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(prompt) == ["<bos>", *row["prompt"].split()]
        assert tokenizer.convert_ids_to_tokens(response) == row["response"].split()
        assert tokenizer.unk_token_id not in prompt + response
        assert tokenizer.decode([*response, tokenizer.eos_token_id], skip_special_tokens=True) == row["response"]
        assert row["response"].split()[0] == "<think>" and row["prompt"].split()[-1] == "?"
    assert len(set(WORDS)) == len(WORDS) == len(tokenizer)


@all_tasks
def test_splits_are_disjoint_for_any_seed(task: Task) -> None:
    train = {row["prompt"] for seed in range(3) for row in prompt_rows(task, "train", task.default_steps, seed, 500)}
    test = [row["prompt"] for row in prompt_rows(task, "test", task.default_steps, 7, 128, unique=True)]
    assert train.isdisjoint(test) and len(set(test)) == 128
    assert {split_of(prompt) for prompt in train} == {"train"} and {split_of(prompt) for prompt in test} == {"test"}


@all_tasks
def test_a_seed_is_a_stream(task: Task) -> None:
    first = list(demonstration_rows(task, "train", task.default_steps, 5, 20))
    assert first == list(demonstration_rows(task, "train", task.default_steps, 5, 40))[:20]
    assert first != list(demonstration_rows(task, "train", task.default_steps, 6, 20))


def test_running_out_of_problems_is_said() -> None:
    with pytest.raises(UserError, match="has only about"):
        list(zip(problems(TASKS["running_sum"], "test", (1, 1), "s", unique=True), range(1000), strict=False))


def test_read_answer() -> None:
    assert read_answer("<think> 1 </think> = 7") == "7"
    assert read_answer("<think> 1 </think> = 1 2") == "1 2"
    for text in ("", "<think> = 7", "<think> </think> 7", "<think> </think> =", "</think> = 7 </think>", "</think>"):
        assert read_answer(text) is None


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    make_task.add_parser(parser.add_subparsers())
    return make_task.run(parser.parse_args(["make-task", *arguments]))


SMALL = ("--demonstrations", "40", "--validation", "10", "--prompts", "30", "--test", "12")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_make_task_writes_a_model_and_data_that_fit(tmp_path: Path, family: str) -> None:
    out = tmp_path / "task"
    assert command("--out", str(out), "--task", "running_sum", "search", "--family", family, *SMALL) == 0
    tokenizer = load_tokenizer(out / "base_model")
    dataset, report = load_sft_dataset(str(out / "sft_train.jsonl"), tokenizer, 400)
    assert report.num_used == len(dataset) == 80 and not report.counts
    rows = [json.loads(line) for line in (out / "sft_train.jsonl").open()]
    for i, row in enumerate(rows):
        words = ["<bos>", *row["prompt"].split(), *row["response"].split(), "<eos>"]
        assert tokenizer.convert_ids_to_tokens(list(dataset[i].token_ids)) == words
    model, loading = AutoModelForCausalLM.from_pretrained(out / "base_model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.vocab_size == len(tokenizer) and model.config.num_attention_heads == 2
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    rows = [json.loads(line) for line in (out / "prompts_test.jsonl").open()]
    assert [row["task"] for row in rows[:2]] == ["running_sum", "search"] and len(rows) == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task"]


def test_make_task_keeps_what_is_done_and_refuses_what_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "task"
    command("--out", str(out), *SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert command("--out", str(out), *SMALL) == 0 and "already made" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UserError, match=": remove it"):
        command("--out", str(out), *SMALL, "--seed", "1")
    for bad, message in [
        (("--task", "sudoku"), "unknown task 'sudoku'; the synthetic tasks are running_sum"),
        (("--steps", "5", "70"), "MAX ≤ 64"),
        (("--width", "50"), "multiple of an even --head-size"),
        (("--test", "0"), "--test must be at least 1"),
        (("--mistake-rate", "2"), "is no probability"),
    ]:
        with pytest.raises(UserError, match=message):
            command("--out", str(tmp_path / "other"), *bad)
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
