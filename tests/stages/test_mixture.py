"""PPO of a mixture whose experts are divided, with live engines: pushes, routing replay, kills."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vcppo.config import Config
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore.learner import Learner
from megatron_vcppo.rollout.messages import NO_VERSION, Sampling
from megatron_vcppo.run.metrics_log import read_metrics
from megatron_vcppo.run.rollout_store import read_places
from megatron_vcppo.stages.share_exchange import experts_format
from tests.helpers.distributed import RanksFailed
from tests.helpers.rollout_stages import Stage, make_config
from tests.helpers.stops import at_call
from tools.benchmarks._rollout_node import RolloutNode, make_prompts, save_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer is among its layers."""
    return save_policy(tmp_path_factory.mktemp("mixture") / "hf", "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])


@pytest.fixture(scope="module")
def engines(mixture: Path) -> Iterator[RolloutNode]:
    """In bfloat16, where the trainer is in float32: their routers disagree."""
    settings = {"engine": {"max_num_seqs": 8, "dtype": "bfloat16"}}
    with RolloutNode(mixture.parent / "node", mixture, settings, routing_replay=True) as node:
        node.wait()
        yield node


def configure(task: Path, mixture: Path, run: Path, replays: bool) -> Config:
    sections: dict[str, Any] = {
        "model": {"hf": str(mixture)},
        "parallel": {"pp": 1, "dp": 2, "ep": 2, "distributed_optimizer": True},
        "stages": ["ppo"],
        "ppo": {
            "iterations": 2,
            "routing_replay": replays,
            "evaluate_every": 2,
            "checkpoint": {"save_every": 100},
            "critic": {"init": "random_head"},
        },
    }
    return make_config(task, run, sections)


def test_engines_send_the_experts_of_every_token(engines: RolloutNode, mixture: Path) -> None:
    """Before the first push: those that transformers chooses for the same tokens, but where bfloat16 tips a balance."""
    sampling = Sampling(routed_experts=True)
    rollouts = engines.client(max_tokens=40).generate(make_prompts(3), 0, NO_VERSION, sampling, 2)
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    form, different = experts_format(Architecture.from_hf(mixture)), []
    for rollout in rollouts:
        ids = [*rollout.prompt.token_ids, *rollout.response_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        theirs = torch.stack([layer.topk(form.per_token).indices for layer in logits], dim=1)[:-1].sort(-1).values
        rows = np.frombuffer(rollout.routed_experts, np.uint8).reshape(-1, form.row_bytes)
        assert len(rows) == len(ids) - 1
        ours = np.sort(form.numbers(rows)[:, [0, 2]], axis=-1)
        different.append((ours != theirs.numpy()).any(-1).mean())
    assert np.mean(different) < 0.1
    (bare, *_) = engines.client(max_tokens=8).generate(make_prompts(1), 0, NO_VERSION, Sampling(), 1)
    assert bare.routed_experts == b""


def test_replay_brings_engine_and_trainer_together_and_survives_a_kill(
    engines: RolloutNode, mixture: Path, task: Path, tmp_path: Path
) -> None:
    plain = Stage(engines, configure(task, mixture, tmp_path / "plain", False), "ppo")
    assert set(plain.run()) == {0}
    replayed = Stage(engines, configure(task, mixture, tmp_path / "replayed", True), "ppo")

    def kill() -> None:
        if int(os.environ["RANK"]) == 1:  # in the second iteration, after two steps of each model in the first one
            at_call(Learner, "train_step", 6, partial(os.kill, os.getpid(), signal.SIGKILL))

    with pytest.raises(RanksFailed, match="rank 1: exit code -9"):
        replayed.run(kill)
    assert set(replayed.run()) == {0}
    without, with_replay = read_metrics(plain.folder), read_metrics(replayed.folder)
    assert [record["iteration"] for record in with_replay] == [1, 2] and "evaluation/avg" in with_replay[-1]
    assert all("actor/router_mismatch" not in record for record in without)
    assert all(0 < record["actor/router_mismatch"] < 0.5 for record in with_replay), "also after the first of two steps"
    # Of the first iteration: both runs have the same weights then, and the same seeds.
    assert 0 < with_replay[0]["rollout/logprob_gap"] < 0.8 * without[0]["rollout/logprob_gap"]
    assert all(rollout.routed_experts for rollout in read_places(replayed.folder / "rollouts", 2).rollouts)
    assert not any(rollout.routed_experts for rollout in read_places(plain.folder / "rollouts", 2).rollouts)
    again = replayed.replay(engines, tmp_path / "again")
    assert again.checkpoint() == replayed.checkpoint()
