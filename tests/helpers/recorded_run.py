"""A run folder with what the stages write, through the code with which they write it; only the models are simulated."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from megatron_vcppo.config import Config
from megatron_vcppo.config.load import dump_config
from megatron_vcppo.data.rollout_share import ModelOutputs, RolloutShare
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.metrics_log import MetricsLog
from megatron_vcppo.run.rollout_store import write_rollouts
from megatron_vcppo.stages.advantage_batch import compute_advantages

END_OF_THINKING = 5
MAX_TOKENS = 128


def make_config(folder: Path, lam_critic: float) -> Config:
    config = Config(stages=["sft", "value_pretrain", "ppo", "evaluate"])
    config.run.dir, config.model.hf = str(folder), "models/tiny"
    config.sft.train = config.prompts.train = "data/train.jsonl"
    config.rollout.max_tokens = MAX_TOKENS
    config.ppo.advantage.lam_critic = lam_critic
    return config


def record_run(folder: Path, collapsing: bool, iterations: int = 12, num_rollouts: int = 48, seed: int = 0) -> Config:
    """A run whose responses get shorter under a critic that starts too low, or longer under one that fits."""
    config = make_config(folder, 0.95 if collapsing else 1.0)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    generator = np.random.default_rng(seed)
    with MetricsLog(folder / "sft", config, "sft", total_iterations=60) as log:
        for step in range(1, 61):
            metrics = {"sft/loss": 4.0 / step**0.5, "sft/entropy": 3.0 / step**0.3, "time/step_s": 0.2}
            log.log(step, metrics | ({"sft/validation_loss": 4.1 / step**0.5} if step % 20 == 0 else {}))
    with MetricsLog(folder / "ppo", config, "ppo", total_iterations=iterations) as log:
        for iteration in range(1, iterations + 1):
            share = (iteration - 1) / max(1, iterations - 1)
            mean_length = 90 * 0.05**share if collapsing else 70 + 40 * share
            rollouts = make_rollouts(generator, iteration, mean_length, num_rollouts)
            write_rollouts(folder / "ppo" / "rollouts", iteration, RolloutPart.whole(rollouts))
            metrics, profiles = diagnostics_of(config, rollouts, generator, -2.6 if collapsing else None)
            metrics |= {"critic/value_loss": 0.4 + 0.1 * generator.random(), "actor/approx_kl": 2e-3}
            metrics |= {"time/generation_s": 3 + generator.random(), "time/update_s": 2.0, "time/iteration_s": 6.3}
            log.log(
                iteration, metrics | ({"evaluation/avg": 0.4, "evaluation/avg_interval": 0.05} if share == 1 else {})
            )
            with (folder / "ppo" / "profiles.jsonl").open("a") as file:
                file.write(json.dumps({"iteration": iteration, **profiles}) + "\n")
    return config


def make_rollouts(generator: np.random.Generator, iteration: int, mean_length: float, count: int) -> list[Rollout]:
    rollouts = []
    for index in range(count):
        length = int(np.clip(generator.normal(mean_length, 20), 4, MAX_TOKENS))
        right = bool(generator.random() < length / MAX_TOKENS)
        truncated = length == MAX_TOKENS
        rollout = Rollout(
            prompt=Prompt(f"sum/{iteration}/{index // 2}", (1, 2, 3), "3 <b>#1</b> +4 ?", "7", "running_sum"),
            sample_index=index % 2,
            seed=index,
            response_ids=(*(9 for _ in range(length - 2)), END_OF_THINKING, 2),
            response_text=" ".join(f"#{i} +{i % 9}" for i in range(length // 2)) + " </think> = 7",
            rollout_logprobs=tuple((-generator.random(length)).tolist()),
            finish_reason="length" if truncated else "stop",
            policy_version=iteration - 1,
        )
        verdict = "correct" if right and not truncated else "wrong: 3 for 7"
        rollouts.append(dataclasses.replace(rollout, reward=1.0 if verdict == "correct" else -1.0, verdict=verdict))
    return rollouts


def diagnostics_of(
    config: Config, rollouts: list[Rollout], generator: np.random.Generator, level: float | None
) -> tuple[dict[str, float], dict[str, list[float | None]]]:
    """level: a critic that says this everywhere; None: one that sees half of the outcome. Group baselines have none."""
    share = RolloutShare.whole(rollouts)
    noise = torch.from_numpy(generator.normal(0, 0.2, share.num_tokens)).float()
    values = None
    if config.ppo.advantage.baseline == "critic":
        values = (0.5 * share.per_token(share.table.rewards) if level is None else level) + noise
    old_logprobs = share.rollout_logprobs + 0.01 * noise
    found = compute_advantages(
        share,
        ModelOutputs(old_logprobs, share.rollout_logprobs, values=values),
        config.ppo.advantage,
        config.ppo.loss,
        returns_config=config.returns,
        kl_coef=0.0,
        max_tokens=MAX_TOKENS,
        end_of_thinking_id=END_OF_THINKING,
        total=lambda sums: sums,
    )
    return found.metrics, found.profiles
