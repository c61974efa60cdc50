"""An experiment with real stages: task, shared stages, arms with engines, report; a second call runs nothing."""

import os
from pathlib import Path

import pytest

from megatron_vcppo.cli import main as vcppo
from megatron_vcppo.report.experiment_results import RESULTS_NAME, read_results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXPERIMENT = """
title: A tiny experiment
config: recipes/long_sum
task: {name: tiny, steps: [2, 4], demonstrations: 200, validation: 8, prompts: 64, test: 8, max_length: 256}
shared:
  stages: [sft, reward_model]
  set:
    model.max_length: 128
    rollout.max_tokens: 32
    rollout.engine.max_num_seqs: 16
    sft.steps: 6
    sft.batch_size: 8
    sft.schedule.warmup_steps: 1
    reward_model.num_prompts: 16
    reward_model.steps: 3
    reward_model.batch_size: 8
set: {ppo.iterations: 2, ppo.prompts_per_iteration: 8, ppo.minibatches: 2, stages: [sft, reward_model, ppo]}
arms:
  plain PPO: {ppo.critic.init: reward_model, ppo.advantage.lam_critic: 0.95}
  no critic: {ppo.advantage.baseline: rloo, rollout.num_samples: 4, ppo.prompts_per_iteration: 2, stages: [sft, ppo]}
claims:
  - {text: One of them keeps its length, outcome: length_drop, higher: plain PPO, than: no critic}
outcomes: [length_first, length_last, mc_explained_variance_last]
"""


def test_real_arms_end_in_a_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, root = tmp_path / "tiny.yaml", tmp_path / "runs"
    file.write_text(EXPERIMENT, encoding="utf-8")
    command = ["experiment", str(file), "--seeds", "1", "--dir", str(root)]
    at_once = min(2, len(os.sched_getaffinity(0)))
    assert vcppo([*command, "--at-once", str(at_once)]) == 0
    out = capfd.readouterr().out
    assert "no critic, seed 0" in out and "not judged: One of them keeps its length" in out
    if at_once > 1:
        assert out.index("no critic, seed 0: starting on") < out.index("plain PPO, seed 0: done"), (
            "the arms run together"
        )
        assert "no critic, seed 0 | " in out and "shared stages, seed 0: done" in out
    results = read_results(root / "tiny" / RESULTS_NAME)
    assert [run.arm for run in results.runs] == ["plain PPO", "no critic"]
    for run in results.runs:
        assert [row["iteration"] for row in run.data.history["ppo"]] == [1, 2] and len(run.data.profiles) == 2
    assert results.values("plain PPO", "mc_explained_variance_last") and not results.values(
        "no critic", "mc_explained_variance_last"
    )
    assert "<svg" in (root / "tiny" / "report.html").read_text()
    assert vcppo(command) == 0
    out = capfd.readouterr().out
    assert "3 chains, 3 of them done before" in out and "starting on" not in out
