"""A mixture of experts trains as transformers' and as itself on one rank, under every layout, with its routers' losses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_vcppo.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import balance, pack_all, rounding, unpack_all
from megatron_vcppo.errors import UserError
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor, Critic
from megatron_vcppo.mcore.model import build_actor, build_critic
from tests.helpers.distributed import run_distributed_test
from tests.helpers.training import make_sequences, step
from tools.benchmarks._tiny_models import save_tiny_model

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.02}
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1)


def start(folder: Path, parallel: ParallelConfig, **model: Any) -> tuple[Actor, Critic]:
    runtime.start(parallel, seed=3, timeout_s=60)
    arch, config = Architecture.from_hf(folder), ModelConfig(hf=str(folder), **{"dtype": "float32", **model})
    actor, critic = build_actor(arch, config, parallel), build_critic(arch, config, parallel)
    load_hf(actor, folder)
    load_hf(critic, folder)
    return (
        Actor(actor, parallel, OPTIMIZER, ScheduleConfig(), total_steps=6),
        Critic(critic, parallel, OPTIMIZER, ScheduleConfig(), total_steps=6),
    )


def train(folder: Path, parallel: ParallelConfig, steps: int = 4) -> dict[str, list[float]]:
    """Losses, gradient norms and what the routers report of each step of both models; log-probs under new weights."""
    actor, critic = start(folder, parallel, **LOSSES)
    history: dict[str, list[float]] = {}
    for seed in range(steps):
        for name, learner in (("actor", actor), ("critic", critic)):
            for key, value in result_of(learner, parallel, seed).items():
                history.setdefault(f"{name} {key}", []).append(value)
    fixed = pack_all(make_sequences(99), 160, *rounding(parallel))
    history["logprobs"] = [value for row in unpack_all(fixed, actor.logprobs(fixed)) for value in row.tolist()]
    return history


def result_of(learner: Actor | Critic, parallel: ParallelConfig, seed: int) -> dict[str, float]:
    sequences = make_sequences(seed)
    total = sum(sum(s.fields["loss_mask"]) for s in sequences)

    def loss(outputs, microbatch):
        mask = microbatch.fields["loss_mask"].float()
        error = -outputs[0] if isinstance(learner, Actor) else 0.5 * (outputs - 1.0) ** 2
        return (error * mask).sum() / total, {}

    mine = balance([len(s) for s in sequences], learner.runtime.dp_size)[learner.runtime.dp_rank]
    # The second replica packs to another budget: it has more micro-batches than the first.
    budget = 160 if learner.runtime.dp_rank == 0 else 90
    result = learner.train_step(pack_all([sequences[i] for i in mine], budget, *rounding(parallel)), loss)
    assert result.applied
    return {**result.metrics, "grad_norm": result.grad_norm}


def distributed(**sizes: Any) -> ParallelConfig:
    return ParallelConfig(distributed_optimizer=True, **sizes)


TP2 = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "ep2-over-replicas": (2, distributed(ep=2)),
    "tp2": (2, ParallelConfig(**TP2)),
    "tp2ep2-recompute": (2, ParallelConfig(**TP2, ep=2, recompute="full")),
    "pp2ep2": (4, distributed(pp=2, ep=2, overlap=True)),
    "cp2ep2": (2, ParallelConfig(cp=2, ep=2)),
    "tp2ep4": (4, ParallelConfig(**TP2, ep=4, overlap=True, recompute="selective")),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, dict[str, list[float]]]]:
    """With a dense layer among the sparse ones, or not: the model, and its training on one rank."""
    dense = {False: [], True: [1]}
    folders = {
        mixed: save_tiny_model(tmp_path_factory.mktemp("hf"), "qwen3_moe", mlp_only_layers=layers)
        for mixed, layers in dense.items()
    }
    return {
        mixed: (folder, run_distributed_test(train, 1, folder, ParallelConfig())[0])
        for mixed, folder in folders.items()
    }


@pytest.mark.parametrize(
    ("mixed", "name"), [(False, name) for name in LAYOUTS] + [(True, "pp2ep2"), (True, "ep2-over-replicas")]
)
def test_training_is_the_same_under_every_layout(
    reference: dict[bool, tuple[Path, dict[str, list[float]]]], mixed: bool, name: str
) -> None:
    folder, expected = reference[mixed]
    world_size, parallel = LAYOUTS[name]
    for ours in run_distributed_test(train, world_size, folder, parallel, timeout_s=120):
        assert ours.keys() == expected.keys()
        for key, values in expected.items():
            worst = max(abs(a - b) for a, b in zip(ours[key], values, strict=True))
            limit = 1e-5 if key != "logprobs" else 1e-4  # AdamW's division magnifies float32 noise in weights
            assert worst <= limit, f"{key} differs by {worst:.1e}"
