"""An experiment of two arms and its runs, recorded as tests/helpers/recorded_run.py does: one arm collapses."""

import json
from pathlib import Path

from megatron_vcppo.run.folder import RunFolder
from tests.helpers.recorded_run import record_run

EXPERIMENT = """
title: Does the collapsing arm collapse?
question: One arm's critic starts too low.
config: demo/vcppo
shared: {stages: [sft, reward_model], per_seed: false}
arms:
  collapsing:
    stages: [sft, reward_model, ppo, evaluate]
    ppo.critic.init: reward_model
    ppo.advantage.lam_critic: 0.95
  sound: {}
claims:
  - {text: The sound arm ends higher, outcome: pass@1, higher: sound, than: collapsing}
  - {text: The collapsing arm loses half of its length, outcome: length_drop, higher: collapsing, than: 0.5}
  - {text: The collapsing arm ends higher, outcome: pass@1, higher: collapsing, than: sound}
  - {text: The sound arm is 99 points better, outcome: pass@1, higher: sound, than: collapsing, by: 0.99}
  - {text: Giving up goes with the drop, correlation: [give_up_advantage, length_drop]}
figures:
  - {curve: rollout/length_mean}
  - {curve: sft/loss, stage: sft}
  - {profile: advantage_by_decile}
  - {scatter: [give_up_advantage, length_drop]}
  - {setting: ppo.advantage.lam_critic, outcome: pass@1}
  - {curve: model_reward/score_mean}
"""
PASS_AT_1 = {"collapsing": (0.10, 0.11, 0.09), "sound": (0.80, 0.86, 0.83)}
"""After PPO, by seed; 0.45 after SFT."""


def record_experiment(folder: Path, seeds: int = 3) -> tuple[Path, Path]:
    """(the experiment file, the folder of experiments) with a run per arm and seed."""
    file = folder / "collapse.yaml"
    file.write_text(EXPERIMENT, encoding="utf-8")
    root = folder / "experiments"
    for arm, scores in PASS_AT_1.items():
        for seed in range(seeds):
            run = root / "collapse" / arm / f"seed_{seed}"
            record_run(run, collapsing=arm == "collapsing", iterations=6, num_rollouts=24, seed=10 * seed)
            rows = [
                {"name": name, "avg": avg, "avg_interval": 0.03, "length_mean": 50.0, "truncated_share": 0.0}
                for name, avg in (("sft", 0.45), ("ppo", scores[seed]))
            ]
            (run / "evaluate").mkdir()
            (run / "evaluate" / "results.json").write_text(json.dumps(rows))
            RunFolder(run).stage("ppo").mark_done()
    return file, root
