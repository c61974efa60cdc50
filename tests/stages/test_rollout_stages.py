"""What stages do with live engines: options of PPO, stored sets, evaluations that continue where they stopped."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.errors import SAVED
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts, stored_iterations
from megatron_vcppo.stages import stored_batches
from megatron_vcppo.stages.rollout_source import StoredRollouts
from megatron_vcppo.stages.stopping import Stopping
from tests.helpers.rollout_stages import Stage, make_config
from tests.helpers.stops import ask_to_stop, at_call
from tools.benchmarks._rollout_node import RolloutNode

pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node


def without_engines(stage: Stage) -> Stage:
    """As the launcher leaves it that started none."""
    (stage.folder / "rendezvous").unlink()
    (stage.folder / "rendezvous").mkdir(mode=0o700)
    return stage


def output_to(log: Path) -> Callable[[], None]:
    def redirect() -> None:
        if os.environ["RANK"] == "0":
            sys.stdout = sys.stderr = log.open("w", buffering=1)

    return redirect


def ask_to_stop_after_storing(iteration: int) -> None:
    """Rank 0 asks itself to stop when it has stored the rollouts of an iteration."""
    write = stored_batches.write_rollouts

    def write_and_ask(folder: Path, number: int, *rest: Any) -> Path:
        path = write(folder, number, *rest)
        if number == iteration:
            os.kill(os.getpid(), signal.SIGUSR2)
        return path

    stored_batches.write_rollouts = write_and_ask  # type: ignore[assignment]


def test_critic_first_then_both_and_what_an_iteration_reports(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """One critic-only iteration, two passes of the critic, KL in the rewards, a cosine that ends with the last step,
    evaluation of a mixture of tasks."""
    mixture = tmp_path / "test.jsonl"
    rows = [json.loads(line) for line in (task / "prompts_test.jsonl").read_text().splitlines()]
    named = [row | {"task": "math"} if i % 2 else row for i, row in enumerate(rows)]
    mixture.write_text("\n".join(map(json.dumps, named)) + "\n")
    ppo = {
        "iterations": 3,
        "critic_only_iterations": 1,
        "evaluate_every": 3,
        "checkpoint": {"save_every": 100, "keep_every": 2, "keep_best": {"metric": "evaluation/avg", "count": 1}},
        "loss": {"kl_coef": 0.1, "kl_in": "reward"},
        "minibatches": 1,
        "schedule": {"kind": "cosine", "min_lr_ratio": 0.1},
        "critic": {
            "init": "random_head",
            "updates_per_actor_update": 2,
            "schedule": {"kind": "cosine", "min_lr_ratio": 0.5},
        },
    }
    config = make_config(task, tmp_path / "run", {"ppo": ppo, "prompts": {"test": str(mixture)}})
    stage = Stage(node, config, "ppo")
    log = tmp_path / "log"
    assert set(stage.run(output_to(log))) == {0}
    first, second, last = read_metrics(stage.folder)
    assert "actor/policy_loss" not in first and "critic/value_loss" in first
    assert second["actor/learning_rate"] == pytest.approx(config.ppo.optimizer.lr)
    assert last["actor/learning_rate"] == pytest.approx(0.1 * config.ppo.optimizer.lr)
    rates = [record["critic/learning_rate"] for record in (first, second, last)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.6 * config.ppo.critic.optimizer.lr
    assert first["actor/kl_ref"] == pytest.approx(0, abs=1e-6) and last["actor/kl_ref"] != 0
    assert {"evaluation/running_sum/avg", "evaluation/math/avg", "evaluation/avg"} <= last.keys()
    assert "time/save_s" not in first and last["time/save_s"] > 0
    assert (stage.folder / "kept" / "best").resolve().name == "iter_0000003"
    assert sorted(path.name for path in (stage.folder / "kept").glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    for record in (first, second, last):
        phases = [value for name, value in record.items() if name.startswith("time/") and name != "time/iteration_s"]
        assert sum(phases) <= record["time/iteration_s"]
    line = next(line for line in log.read_text().splitlines() if "ppo 3/3" in line)
    for name in ("reward", "pass@1", "length", "ev", "kl", "gap", "generation_s", "sync_s", "update_s", "iteration_s"):
        assert f" {name} " in line, line


def test_a_stored_set_is_generated_once_for_many_critics(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    chosen = {"rollouts": "stored", "stored_rollouts": 16, "stored_path": str(tmp_path / "set"), "steps": 3}
    changes: dict[str, Any] = {"value_pretrain": chosen}
    first = Stage(node, make_config(task, tmp_path / "first", changes), "value_pretrain")
    assert set(first.run()) == {0} and len(read_metrics(first.folder)) == 3
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}

    changes |= {
        "run": {"dir": str(tmp_path / "second"), "seed": 5},
        "rollout": {"max_tokens": 24, "start_timeout_s": 1},
    }
    second = without_engines(Stage(node, make_config(task, tmp_path / "second", changes), "value_pretrain"))
    log = tmp_path / "log"
    assert set(second.run(output_to(log))) == {0} and "under other settings" not in log.read_text()
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert second.checkpoint() != first.checkpoint()

    changes |= {"run": {"dir": str(tmp_path / "third")}, "rollout": {"max_tokens": 25}}
    third = without_engines(Stage(node, make_config(task, tmp_path / "third", changes), "value_pretrain"))
    assert set(third.run(output_to(log))) == {0}
    assert "was made under other settings (rollout.max_tokens)" in log.read_text()


def test_a_set_that_is_interrupted_is_finished_and_a_bad_reward_model_ends_saved(
    node: RolloutNode, task: Path, tmp_path: Path
) -> None:
    settings = {"num_prompts": 8, "steps": 4, "batch_size": 4, "optimizer": {"lr": 1e30}}
    sections = {"stages": ["reward_model"], "reward_model": settings, "run": {"skip_limit": 2}}
    stage = Stage(node, make_config(task, tmp_path / "run", sections), "reward_model")

    def in_parts() -> None:
        StoredRollouts.CHUNK = 3
        at_call(Stopping, "point", 3, ask_to_stop)  # before the third part

    assert set(stage.run(in_parts)) == {SAVED}
    rollouts = stage.folder / "rollouts"
    assert stored_iterations(rollouts) == [1, 2] and not (rollouts / "set.json").exists()
    before = [read_rollouts(rollouts, part) for part in (1, 2)]

    def only_in_parts() -> None:
        StoredRollouts.CHUNK = 3
        output_to(tmp_path / "log")()

    assert stage.run(only_in_parts)[0] == 2
    assert [read_rollouts(rollouts, part) for part in (1, 2)] == before
    assert [len(read_rollouts(rollouts, part)) for part in (1, 2, 3)] == [3, 3, 2]
    ids = [rollout.prompt.prompt_id for part in (1, 2, 3) for rollout in read_rollouts(rollouts, part)]
    assert len(set(ids)) == 8
    text = (tmp_path / "log").read_text()
    assert "2 updates of the reward model in a row" in text and "saved at iteration 3" in text, text
    assert [path.name for path in (stage.folder / "checkpoints").glob("iter_*")] == ["iter_0000003"]


def test_an_evaluation_goes_on_with_the_checkpoints_that_are_left(
    node: RolloutNode, task: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(task / "base_model", other)
    found = {"base": str(task / "base_model"), "other": str(other)}
    sections = {"stages": ["evaluate"], "evaluate": {"checkpoints": found, "num_samples": 2, "k": [1, 2]}}
    stage = Stage(node, make_config(task, tmp_path / "run", sections), "evaluate")
    assert set(stage.run(lambda: ask_to_stop_after_storing(0))) == {SAVED}
    first = next((stage.folder / "rollouts").glob("iter_0000000_*"))
    before = first.stat().st_mtime_ns
    assert set(stage.run()) == {0} and first.stat().st_mtime_ns == before
    results = json.loads((stage.folder / "results.json").read_text())
    assert "| base |" in (stage.folder / "results.md").read_text()
    assert [row["name"] for row in results] == ["base", "other"] and results[0]["avg"] == results[1]["avg"]
