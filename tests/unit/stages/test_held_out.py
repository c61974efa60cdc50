"""What an evaluation reports: over all and by task, as metrics and as a table."""

import pytest

from megatron_vcppo.records import Prompt, Rollout
from megatron_vcppo.stages.evaluate import table
from megatron_vcppo.stages.held_out import evaluation_metrics, scores


def rollouts(task: str, right: list[list[bool]], length: int) -> list[Rollout]:
    return [
        Rollout(Prompt(f"{task}:{i}", (1,), "", "", task), j, 0, (2,) * length, "", (), "stop", 0, 1.0 if ok else -1.0)
        for i, row in enumerate(right)
        for j, ok in enumerate(row)
    ]


SUM = rollouts("sum", [[True, False], [True, True]], 4)
LIST = rollouts("list", [[False, False], [False, True]], 8)


def test_one_task() -> None:
    found = scores(SUM, [1, 2])
    assert found["avg"] == 0.75 and found["pass"]["2"][0] == 1.0 and found["length_mean"] == 4 and not found["tasks"]
    metrics = evaluation_metrics(SUM, [1, 2])
    assert set(metrics) == {
        "evaluation/avg",
        "evaluation/avg_interval",
        "evaluation/length_mean",
        "evaluation/truncated_share",
        "evaluation/pass@1",
        "evaluation/pass@1_interval",
        "evaluation/pass@2",
        "evaluation/pass@2_interval",
    }


def test_a_mixture_is_reported_by_task_too() -> None:
    metrics = evaluation_metrics(SUM + LIST, [2])
    assert metrics["evaluation/avg"] == 0.5 and metrics["evaluation/pass@2"] == 0.75
    assert metrics["evaluation/sum/avg"] == 0.75 and metrics["evaluation/list/pass@2"] == 0.5
    assert metrics["evaluation/list/avg"] == pytest.approx(0.25)
    lines = table([{"name": "ppo", **scores(SUM + LIST, [2])}]).splitlines()
    assert [line.split()[0] for line in lines] == ["checkpoint", "ppo", "sum", "list"]
    assert "75.0" in lines[2] and "25.0" in lines[3]
