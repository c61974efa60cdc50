"""What counts as right in the synthetic tasks."""

import pytest

from megatron_vcppo.records import Prompt
from megatron_vcppo.rewards.registry import verify_synthetic
from megatron_vcppo.tasks.generate import TASKS, demonstration_rows


def prompt(answer: str, task: str, text: str) -> Prompt:
    return Prompt("p:1", (1,), text, answer, task)


@pytest.mark.parametrize("name", list(TASKS))
def test_synthetic_tasks(name: str) -> None:
    task = TASKS[name]
    for row in demonstration_rows(task, "train", task.default_steps, 0, 50):
        ask = prompt(row["answer"], name, row["prompt"])
        head = row["response"].rpartition("</think>")[0]
        assert verify_synthetic(ask, f"{head}</think> = {row['answer']}").verdict == "correct"
        chat = prompt(row["answer"], name, f"<bos> {row['prompt']}")
        assert verify_synthetic(chat, f"{head}</think> = {row['answer']}").verdict == "correct"
        assert verify_synthetic(ask, f"{head}</think> = {row['answer']} {row['answer']} 1").verdict == "wrong"
        assert verify_synthetic(ask, f"{head} = {row['answer']}").verdict == "no answer"
        assert verify_synthetic(ask, f"{head}</think> {row['answer']}").verdict == "no answer"
