"""A chain that trains adapters, with live engines: SFT, value pretraining, PPO with a KL term, both exports."""

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megatron_vcppo.hf.adapters import StoredAdapters
from megatron_vcppo.run.manifest import read_manifest
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_rollouts
from megatron_vcppo.stages import export
from tests.helpers.rollout_stages import Stage, make_config
from tools.benchmarks._rollout_node import RolloutNode

pytestmark = pytest.mark.timeout(600)  # the first test also waits for the node


def test_a_chain_trains_adapters_on_one_base(node: RolloutNode, task: Path, tmp_path: Path) -> None:
    fast = {"lr": 1e-2}
    sections = {
        "stages": ["sft", "value_pretrain", "ppo", "export"],
        "model": {"lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "gate_proj", "down_proj"]}},
        "sft": {"train": str(task / "sft_train.jsonl"), "steps": 2, "batch_size": 8, "optimizer": fast},
        "value_pretrain": {"steps": 2, "optimizer": fast},
        "ppo": {
            "iterations": 3,
            "minibatches": 1,
            "evaluate_every": 0,
            "loss": {"kl_coef": 0.1},
            "optimizer": fast,
            "critic": {"optimizer": fast},
        },
        "export": {"peft": True, "verify_logits": False},
    }
    config = make_config(task, tmp_path / "run", sections)
    config.sft.schedule.warmup_steps = 0
    logs = {}
    for name in ("sft", "value_pretrain", "ppo"):
        logs[name] = tmp_path / f"{name}.log"

        def to_log(log: Path = logs[name]) -> None:
            if os.environ["RANK"] == "0":
                sys.stdout = sys.stderr = log.open("w", buffering=1)

        stage = Stage(node, config, name)
        assert set(stage.run(to_log)) == {0}, logs[name].read_text()
    base = config.model.hf
    assert f"value_pretrain: actor and critic share one base: {base}" in logs["value_pretrain"].read_text()
    assert f"ppo: actor and critic share one base: {base}" in logs["ppo"].read_text()

    records = read_metrics(stage.folder)
    assert all(record["rollout/logprob_gap"] < 1e-3 for record in records), "engines have the merged weights"
    assert records[0]["actor/kl_ref"] == pytest.approx(0, abs=1e-6), "the reference is SFT's actor"
    assert records[2]["actor/kl_ref"] > 1e-4
    checkpoint = stage.folder / read_manifest(stage.folder)["meta"]["checkpoint"]
    for name in ("actor", "critic"):
        stored = StoredAdapters.of_manifest(checkpoint / name, read_manifest(checkpoint / name)["meta"])
        assert stored is not None and stored.base.path == base

    export.run(config)
    folder = tmp_path / "run" / "export"
    merged = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rollout = read_rollouts(stage.folder / "rollouts", 3)[0]
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    with torch.no_grad():
        untrained = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, str(folder / "peft"))(ids).logits
        assert (merged(ids).logits - adapted).abs().max() <= 1e-4
    assert (untrained - adapted).abs().max() > 0.01
