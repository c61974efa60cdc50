"""The table of a sweep, and its end on request."""

import json
import os
import signal
from pathlib import Path

from megatron_vcppo.commands import sweep
from megatron_vcppo.commands.sweep import Chain, results
from megatron_vcppo.errors import DONE, SAVED
from megatron_vcppo.launch.sweep_points import points, write_points
from tools.benchmarks._tiny_chains import tiny_config, write_config


def test_a_sweeps_table_says_what_came_out(tmp_path: Path) -> None:
    made, _ = points(["ppo.advantage.lam_actor=[0.95, 1.0]"])
    write_points(tmp_path, made)
    config = tiny_config(tmp_path / made[0].name, ("sft", "ppo", "evaluate"))
    config.prompts.test = "test.jsonl"
    run = write_config(config)
    for stage in ("ppo", "evaluate"):
        (run.stage(stage).logs / "attempt_1").mkdir(parents=True)
    record = {"iteration": 9, "rollout/accuracy": 0.75, "critic/explained_variance": 0.25, "critic/value_loss": 1.0}
    run.stage("ppo").metrics.write_text(json.dumps(record) + "\n")
    shared = {"length_mean": 30.0, "truncated_share": 0.0}
    scores = {"sft": {"avg": 0.4, "avg_interval": 0.04}, "ppo": {"avg": 0.85, "avg_interval": 0.03}}
    found = [{"name": name, **score, **shared} for name, score in scores.items()]
    run.stage("evaluate").results.write_text(json.dumps(found))
    first, second = results(tmp_path)
    assert first["rollout/accuracy"] == 0.75 and "critic/value_loss" not in first
    assert first["avg of sft"] == "40.0 ± 4.0" and first["avg of ppo"] == "85.0 ± 3.0" and first["stage"] == "evaluate"
    assert second == {"run": "1", "ppo.advantage.lam_actor": "1.0"}


def test_a_request_to_stop_ends_the_sweep(tmp_path: Path, monkeypatch) -> None:
    made, _ = points(["ppo.advantage.lam_actor=[0.95, 1.0]"])
    config = tiny_config(tmp_path / "run")
    chains = [Chain(point, write_config(config), config, ["sft"], []) for point in made]
    begun = []

    def start(chain: Chain) -> int:
        begun.append(chain.point.name)
        os.kill(os.getpid(), signal.SIGINT)
        return DONE

    monkeypatch.setattr(sweep, "start", start)
    assert sweep.start_all(chains) == SAVED and begun == ["0"]
