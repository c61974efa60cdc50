"""The whole chain through ``vcppo run``: real ranks, real engines, one of them killed on the way."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vcppo.cli import main as vcppo
from megatron_vcppo.run import events
from megatron_vcppo.run.folder import RunFolder
from megatron_vcppo.run.metrics_log import read_metrics
from tools.benchmarks._tiny_chains import processes_with, ranks_of, wait_until

STAGES = ["sft", "reward_model", "value_pretrain", "ppo", "export", "evaluate"]


def write_recipe(folder: Path) -> Path:
    task = folder / "task"
    sizes = ["--demonstrations", "200", "--validation", "8", "--prompts", "64", "--test", "8"]
    assert vcppo(["make-task", "--out", str(task), *sizes]) == 0
    recipe = {
        "run": {"dir": str(folder / "run"), "timeout_s": 120},
        "model": {"hf": str(task / "base_model"), "dtype": "float32", "max_length": 256},
        "parallel": {"pp": 2, "tokens_per_microbatch": 512},
        "stages": STAGES,
        "prompts": {"train": str(task / "prompts_train.jsonl"), "test": str(task / "prompts_test.jsonl")},
        "rollout": {"max_tokens": 32, "engine": {"max_num_seqs": 16}},
        "sft": {
            "train": str(task / "sft_train.jsonl"),
            "steps": 6,
            "batch_size": 8,
            "optimizer": {"lr": 4e-3},
            "schedule": {"warmup_steps": 1},
        },
        "reward_model": {"num_prompts": 16, "steps": 3, "batch_size": 8, "truncated_share": 0.25},
        "value_pretrain": {
            "rollouts": "stored",
            "stored_path": "${run.dir}/reward_model/rollouts",
            "stored_rollouts": 16,
            "steps": 3,
            "batch_size": 8,
        },
        "ppo": {
            "iterations": 3,
            "prompts_per_iteration": 8,
            "minibatches": 2,
            "checkpoint": {"save_every": 1},
            "optimizer": {"lr": 1e-3},
        },
        "evaluate": {"num_samples": 2, "k": [1, 2]},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_chain_ends_with_a_checkpoint_for_transformers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"

    def kill_a_rank_of_ppo() -> None:
        wait_until(lambda: list((run / "ppo" / "checkpoints").glob("iter_*")), "a checkpoint of ppo", 900)
        (rank,) = ranks_of(RunFolder(run), "ppo", 1)
        os.kill(rank, signal.SIGKILL)

    killer = threading.Thread(target=kill_a_rank_of_ppo)
    killer.start()
    code = vcppo(["run", str(recipe)])
    killer.join()
    output = capsys.readouterr().out
    assert code == 0, output
    killed = [event for event in events.read(run) if event["event"] == "attempt_end" and event["code"] == 137]
    assert [event["stage"] for event in killed] == ["ppo"] and "trainer 1 was killed by SIGKILL" in killed[0]["cause"]
    engines = [path.read_text() for path in run.glob("*/logs/attempt_*/rollout_0.log")]
    assert len(engines) >= 3 and all(", forked" in text for text in engines)
    assert [record["iteration"] for record in read_metrics(run / "ppo")] == [1, 2, 3]
    assert [record["iteration"] for record in read_metrics(run / "value_pretrain")] == [1, 2, 3]

    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert [row["name"] for row in results] == ["sft", "ppo"]
    assert all(set(row["pass"]) == {"1", "2"} and 0 <= row["avg"] <= 1 for row in results)
    assert "pass@2" in output
    exported = run / "export" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    prompt = json.loads((tmp_path / "task" / "prompts_test.jsonl").read_text().splitlines()[0])["prompt"]
    out = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=4)
    assert out.shape[1] > 4

    assert vcppo(["run", str(recipe)]) == 0
    assert capsys.readouterr().out.count("done before, skipped") == len(STAGES)
    assert not processes_with(str(run))
