"""Stored rollouts are taken for what they are: never for those of another policy, never again if they are there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vcppo.config import Config
from megatron_vcppo.records import Prompt, Rollout, RolloutPart
from megatron_vcppo.run.manifest import write_manifest
from megatron_vcppo.run.rollout_store import (
    ORIGIN_BEFORE,
    StoredSet,
    claim,
    needs_engines,
    origin_differences,
    partial_iterations,
    stored_iterations,
    stored_set,
    write_partial,
    write_rollouts,
)
from megatron_vcppo.stages.provenance import origin_of, origin_of_evaluation
from megatron_vcppo.stages.rollout_source import misfit
from tools.benchmarks._tiny_models import VOCAB_SIZE, save_tiny_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(stages=["sft", "value_pretrain", "ppo"])
    config.run.dir, config.model.hf = str(tmp_path / "run"), str(tmp_path / "model")
    config.prompts.train = "train.jsonl"
    for name, text in (("model", "weights"), ("run/sft/checkpoints/iter_0000001/actor", "actor")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "w.safetensors").write_text(text)
    actor = tmp_path / "run/sft/checkpoints/iter_0000001/actor"
    write_manifest(actor, {})
    write_manifest(tmp_path / "run/sft", {"checkpoint": "checkpoints/iter_0000001"})
    return config


def store(folder: Path, iterations: int) -> None:
    for iteration in range(1, iterations + 1):
        rollout = Rollout(Prompt("p", (1,), "", "", "t"), 0, 0, (2,), "", (-1.0,), "stop", 0)
        write_rollouts(folder, iteration, RolloutPart.whole([rollout]))


def test_an_interrupted_iteration_keeps_its_responses_only_under_the_same_settings(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rollouts"
    claim(folder, origin_of(config, "ppo"), 0)
    store(folder, 5)
    config.ppo.iterations, config.ppo.checkpoint.save_every, config.parallel.tp = 500, 3, 4
    for iteration in (-3, 3, 6):
        write_partial(folder, iteration, RolloutPart(), 0, 1)
    claim(folder, origin_of(config, "ppo"), 3)
    assert stored_iterations(folder) == [1, 2, 3, 4, 5] and capsys.readouterr().out == ""
    assert partial_iterations(folder) == [-3, 3, 6]
    config.ppo.optimizer.lr = 1e-9
    claim(folder, origin_of(config, "ppo"), 3)
    assert stored_iterations(folder) == [1, 2, 3] and partial_iterations(folder) == [3]
    assert "iterations 4 to 5 were generated under other settings (ppo.optimizer.lr)" in capsys.readouterr().out
    store(folder, 5)
    config.prompts.verifiers = {"mine": "module:function"}
    claim(folder, origin_of(config, "ppo"), 4)
    assert stored_iterations(folder) == [1, 2, 3, 4]


def test_an_origin_of_an_earlier_version_fits_and_renamed_keys_still_count(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    config.returns.overlong_penalty_tokens, config.values.bounds = 4, [-2.0, 2.0]
    claim(folder, origin_of(config, "ppo"), 0)
    recorded = json.loads((folder / "origin.json").read_text())
    assert recorded["ppo.advantage"]["overlong_penalty_tokens"] == 4 and recorded["ppo.critic"]["bounds"] == [-2.0, 2.0]
    config.run.skip_limit = 99
    assert origin_differences(folder, origin_of(config, "ppo")) == []
    config.returns.gamma, config.values.huber_delta = 0.5, 1.0
    assert origin_differences(folder, origin_of(config, "ppo")) == ["ppo.advantage.gamma", "ppo.critic.huber_delta"]


def test_what_changes_prompts_is_recorded_and_origins_from_before_these_keys_fit(
    config: Config, tmp_path: Path
) -> None:
    old = replace(config, prompts=replace(config.prompts, apply_chat_template=False))
    for stage, made in (("ppo", origin_of(old, "ppo")), ("evaluate", origin_of_evaluation(old, {}))):
        earlier = {key: value for key, value in made.items() if key not in ORIGIN_BEFORE}
        claim(tmp_path / stage, earlier, 0)
        assert origin_differences(tmp_path / stage, made) == [] and len(earlier) < len(made)
    changes: dict[str, Any] = {
        "apply_chat_template": True,
        "template": "Q: {prompt}",
        "system": "be brief",
        "chat_template_kwargs": {"enable_thinking": False},
        "mix": {"more.jsonl": 2.0},
    }
    for name, value in changes.items():
        changed = replace(old, prompts=replace(old.prompts, **{name: value}))
        assert origin_differences(tmp_path / "ppo", origin_of(changed, "ppo")) == [f"prompts.{name}"]
        claim(tmp_path / name, origin_of(changed, "ppo"), 0)
        assert origin_differences(tmp_path / name, origin_of(old, "ppo")) == [f"prompts.{name}"]
        evaluated = origin_differences(tmp_path / "evaluate", origin_of_evaluation(changed, {}))
        assert evaluated == ([] if name == "mix" else [f"prompts.{name}"])


def test_an_actor_is_known_by_its_weights(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    made = origin_of(config, "value_pretrain")
    claim(folder, made, 0)
    moved = replace(config, run=replace(config.run, dir=str(tmp_path / "copy"), seed=7))
    (tmp_path / "run").rename(tmp_path / "copy")
    assert origin_differences(folder, origin_of(moved, "value_pretrain")) == []
    actor = tmp_path / "copy/sft/checkpoints/iter_0000001/actor"
    (actor / "w.safetensors").write_text("trained on")
    write_manifest(actor, {})
    assert origin_differences(folder, origin_of(moved, "value_pretrain")) == ["actor"]
    moved.rollout.temperature = 0.5
    assert origin_differences(folder, origin_of(moved, "value_pretrain")) == ["actor", "rollout.temperature"]
    (folder / "origin.json").unlink()
    assert origin_differences(folder, made) == []


def test_a_complete_set_needs_no_engines(config: Config, tmp_path: Path) -> None:
    assert needs_engines(config, "ppo") and needs_engines(config, "value_pretrain")
    assert stored_set(config, "ppo") is None and stored_set(config, "value_pretrain") is None
    settings = config.value_pretrain
    settings.rollouts, settings.stored_rollouts, settings.stored_path = "stored", 4, str(tmp_path / "set")
    found = stored_set(config, "value_pretrain")
    assert found is not None and not found.is_own
    store(found.folder, 1)
    assert needs_engines(config, "value_pretrain")
    found.mark_complete()
    assert not needs_engines(config, "value_pretrain")
    settings.stored_rollouts = 5
    assert needs_engines(config, "value_pretrain")
    config.reward_model.num_prompts, config.rollout.num_samples = 2, 2
    mine = stored_set(config, "reward_model")
    assert mine is not None and mine.is_own and (mine.num_rollouts, mine.is_complete) == (4, False)
    assert mine.folder == Path(config.run.dir) / "reward_model" / "rollouts"


def test_a_set_begun_by_another_policy_is_not_complete(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    claim(folder, origin_of(config, "value_pretrain"), 0)
    (folder / "set.json").write_text(json.dumps({"num_rollouts": 9}))
    config.rollout.max_tokens = 7
    claim(folder, origin_of(config, "value_pretrain"), 0)
    assert not (folder / "set.json").exists()


def test_a_set_that_the_model_cannot_read_is_refused(tmp_path: Path) -> None:
    config = Config()
    config.model.hf, config.model.max_length = str(save_tiny_model(tmp_path / "model", "qwen2")), 5
    wanted = StoredSet(tmp_path / "set", 1, False)

    def rollout(*ids: int) -> Rollout:
        return Rollout(Prompt("p:7", (1, 2), "", "", "t"), 3, 0, ids, "", (-1.0,) * len(ids), "stop", 0)

    assert misfit([rollout(1, 2, VOCAB_SIZE - 1)], wanted, config) == ""
    too_long = misfit([rollout(1), rollout(1, 2, 3, 4)], wanted, config)
    assert too_long.endswith("set: p:7 sample 3 has 6 tokens, model.max_length is 5")
    unknown = misfit([rollout(VOCAB_SIZE)], wanted, config)
    assert f"has token {VOCAB_SIZE}, the vocabulary of " in unknown and unknown.endswith(f" has {VOCAB_SIZE}")


def test_scores_belong_to_their_reward_model(config: Config, tmp_path: Path) -> None:
    config.stages = ["sft", "reward_model", "value_pretrain", "ppo"]
    without = origin_of(config, "ppo")
    config.rewards.model.path = config.model.hf
    scored = origin_of(config, "ppo")
    claim(tmp_path / "rollouts", without, 0)
    assert "rewards.model" in origin_differences(tmp_path / "rollouts", scored)
    assert origin_of(config, "reward_model").keys().isdisjoint({"rewards.model"}), "no model rewards this stage"
    claim(tmp_path / "rollouts", scored, 0)
    assert origin_differences(tmp_path / "rollouts", without) == [], "verdicts stay valid without the model"
    (tmp_path / "model" / "w.safetensors").write_text("other weights")
    assert origin_differences(tmp_path / "rollouts", origin_of(config, "ppo")) == ["rewards.model"]
    config.rewards.model.weight = 0.5
    assert "rewards.model.weight" in origin_differences(tmp_path / "rollouts", origin_of(config, "ppo"))


def test_a_key_that_is_newer_than_the_record_had_its_default(config: Config, tmp_path: Path) -> None:
    made = origin_of(config, "ppo")
    old = {key: dict(value) if isinstance(value, dict) else value for key, value in made.items()}
    del old["ppo.loss"]["kind"], old["ppo.staleness"]
    claim(tmp_path, old, 0)
    assert origin_differences(tmp_path, made) == []
    config.ppo.loss.kind, config.ppo.staleness = "dis", 1
    assert origin_differences(tmp_path, origin_of(config, "ppo")) == ["ppo.staleness", "ppo.loss.kind"]
