"""What can go wrong in stages that generate, with live engines: each ends in one line, and nothing is lost."""

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.run.manifest import write_manifest
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts, stored_iterations
from tests.helpers.distributed import RanksFailed
from tests.helpers.rollout_stages import Stage, make_config
from tools.benchmarks._rollout_node import RolloutNode
from tools.benchmarks._tiny_models import save_tiny_model

PPO = {"critic": {"init": "sft"}, "evaluate_every": 0}


def output_of(stage: Stage, log: Path) -> tuple[str, int]:
    """What rank 0 prints, and its exit code."""

    def redirect() -> None:
        if os.environ["RANK"] == "0":
            sys.stdout = sys.stderr = log.open("w", buffering=1)

    code = stage.run(redirect)[0]
    return log.read_text(), code


def test_groups_without_variance_are_said_and_trained_on(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """The untrained model is always wrong: no variance within any group, nor between them."""
    ppo = {**PPO, "dynamic_sampling": True, "dynamic_sampling_rounds": 2, "iterations": 2, "prompts_per_iteration": 3}
    config = make_config(task, tmp_path / "run", {"ppo": ppo, "rollout": {"num_samples": 2}})
    stage = Stage(node, config, "ppo")
    text, code = output_of(stage, tmp_path / "log")
    assert code == 0 and stage.done, text
    assert "iteration 2: 3 of 3 prompts are missing after 2 rounds" in text
    assert stored_iterations(stage.folder / "rollouts") == [2, 3, 4, 5]
    records = read_metrics(stage.folder)
    assert [record["rollout/equal_groups"] for record in records] == [1.0, 1.0]
    assert all(value == value for record in records for value in record.values() if isinstance(value, float))


def test_a_critic_out_of_range_is_named(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    """A step so large that the new weights, though finite, give no values."""
    critic = {"critic": {"init": "sft", "optimizer": {"lr": 1e30}}, "critic_only_iterations": 6}
    stage = Stage(node, make_config(task, tmp_path / "run", {"ppo": {**PPO, **critic}}), "ppo")
    text, code = output_of(stage, tmp_path / "log")
    assert code == 2 and "Traceback" not in text, text
    assert "ppo: iteration 2: not finite on valid tokens" in text and "values: " in text and "resume" in text


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_stage_saved(
    node: RolloutNode, task: Path, tmp_path: Path
) -> None:
    """The actor's loss is beyond float32 while the critic learns: its weights stay as they were."""
    ppo = {**PPO, "loss": {"entropy_coef": 1e39}, "critic_only_iterations": 1}
    config = make_config(task, tmp_path / "run", {"ppo": ppo, "run": {"skip_limit": 5}})
    stage = Stage(node, config, "ppo")
    text, code = output_of(stage, tmp_path / "log")
    assert code == 2 and "Traceback" not in text, text
    assert "skipped 2 of 2 updates of the actor (2 in a row)" in text and "saved at iteration 4" in text
    assert (stage.folder / "checkpoints" / "iter_0000004").is_dir()
    assert [record["iteration"] for record in read_metrics(stage.folder)] == [1, 2, 3, 4]


def test_a_critic_of_another_architecture_is_named(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    other = Architecture.from_hf(save_tiny_model(tmp_path / "other", "qwen3"))
    critic = tmp_path / "critic"
    critic.mkdir()
    for kind, message in (("critic", "num_layers 4 (not 2)"), ("actor", "holds 'actor', not a critic")):
        write_manifest(critic, {"kind": kind, "architecture": other.to_dict()})
        ppo = {**PPO, "critic": {"init": "checkpoint", "checkpoint_path": str(critic)}}
        stage = Stage(node, make_config(task, tmp_path / kind, {"ppo": ppo}), "ppo")
        text, code = output_of(stage, tmp_path / "log")
        assert code == 2 and "Traceback" not in text and message in text, text
        assert str(critic) in text


def test_no_prompts_and_prompts_without_room(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    stage = Stage(node, make_config(task, tmp_path / "run", {"ppo": PPO, "prompts": {"train": str(empty)}}), "ppo")
    text, code = output_of(stage, tmp_path / "log")
    assert code == 2 and "Traceback" not in text and str(empty) in text, text
    long = tmp_path / "long.jsonl"
    line = (task / "prompts_train.jsonl").read_text().splitlines()[0]
    long.write_text(line.replace('"prompt": "', '"prompt": "' + "3 " * 300) + "\n")
    stage = Stage(node, make_config(task, tmp_path / "run2", {"ppo": PPO, "prompts": {"train": str(long)}}), "ppo")
    text, code = output_of(stage, tmp_path / "log")
    assert code == 2 and f"{long}:1: too long" in text, text


def test_a_context_that_the_model_does_not_have_is_named(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    stage = Stage(node, make_config(task, tmp_path / "run", {"ppo": PPO, "model": {"max_length": 2048}}), "ppo")
    text, code = output_of(stage, tmp_path / "log")
    assert code == 2 and "model.max_length 2048 is more than the 1024 positions of" in text, text


def test_a_verifier_that_hangs_costs_its_answers_and_is_shown(
    node: RolloutNode, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside problems of a task that nobody can judge, which every rank must leave out."""
    (tmp_path / "own_verifiers.py").write_text("import time\n\ndef hangs(prompt, response):\n    time.sleep(3600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = (task / "prompts_train.jsonl").read_text().splitlines()[:12]
    lines[3] = lines[3].replace("running_sum", "poetry")
    renamed = [json.loads(line) for line in lines]
    renamed = [{"q": row["prompt"], "a": row["answer"], "kind": row["task"]} for row in renamed]
    del renamed[5]["kind"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, renamed)) + "\n")
    prompts = {"train": str(tmp_path / "prompts.jsonl"), "bad_samples": "skip", "verify_timeout_s": 0.5}
    prompts |= {"prompt_key": "q", "answer_key": "a", "task_key": "kind", "task": "running_sum", "test": None}
    prompts |= {"verifiers": {"running_sum": "own_verifiers:hangs"}, "verify_workers": 4, "verify_memory_mib": 512}
    sections = {"prompts": prompts, "ppo": {**PPO, "iterations": 1}, "rollout": {"max_tokens": 200}}
    stage = Stage(node, make_config(task, tmp_path / "run", sections), "ppo")
    text, code = output_of(stage, tmp_path / "log")
    assert code == 0, text
    rollouts = read_rollouts(stage.folder / "rollouts", 1)
    late = [rollout for rollout in rollouts if rollout.verdict == "timeout: 0.5 s"]
    assert late and all(rollout.reward == -1.0 for rollout in late)
    assert {rollout.verdict for rollout in rollouts} <= {"timeout: 0.5 s", "truncated"}
    assert read_metrics(stage.folder)[0]["rollout/verifier_timeouts"] == len(late)
    assert text.count("warning: verifier: ") == len(late) and "1 × unknown task" in text
    assert "12 samples, 11 used, 1 skipped" in text


def test_an_actor_out_of_range_is_named(task: Path, tmp_path: Path) -> None:
    """On its own engine: what such weights leave in a cache can spoil later answers; a stage starts new ones."""
    config = make_config(task, tmp_path / "run", {"ppo": {**PPO, "optimizer": {"lr": 1e30}}})
    with RolloutNode(tmp_path / "node", task / "base_model", {"engine": {"max_num_seqs": 8}}) as own:
        own.wait()
        with pytest.raises(RanksFailed, match=r"was refused: .* log-probs that are not finite: weights 1, or"):
            Stage(own, config, "ppo").run()
