"""Actor and critic of a tiny model, and steps on random sequences: for tests of what steps must not depend on."""

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_vcppo.config import Dtype, ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_vcppo.data.packing import PackedMicrobatch, balance, pack_all, rounding
from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.mcore import runtime
from megatron_vcppo.mcore.hf_weights_io import load_hf
from megatron_vcppo.mcore.learner import Actor, Critic
from megatron_vcppo.mcore.model import CriticModel, build_actor, build_critic
from megatron_vcppo.records import TrainSequence
from tests.helpers.checkpoints import checkpoint_folder
from tools.benchmarks._tiny_models import VOCAB_SIZE

SCHEDULE = ScheduleConfig(kind="cosine", warmup_steps=2)


def make_sequences(seed: int, count: int = 12) -> list[TrainSequence]:
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for _ in range(count):
        length = int(torch.randint(5, 60, (), generator=generator))
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        sequences.append(TrainSequence(tuple(ids), {"loss_mask": (False,) * 3 + (True,) * (length - 3)}))
    return sequences


def start(
    hf: Path,
    parallel: ParallelConfig,
    dtype: Dtype = "float32",
    timeout_s: float = 60.0,
    prepare: Callable[[CriticModel], None] = lambda critic: None,
) -> tuple[Actor, Critic]:
    """prepare: changes the critic before it gets its optimizer."""
    runtime.start(parallel, seed=3, timeout_s=timeout_s)
    arch, config = Architecture.from_hf(hf), ModelConfig(hf=str(hf), dtype=dtype)
    actor, critic = build_actor(arch, config, parallel), build_critic(arch, config, parallel)
    load_hf(actor, hf)
    load_hf(critic, hf)
    prepare(critic)
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.1)
    return (
        Actor(actor, parallel, optimizer, SCHEDULE, total_steps=6),
        Critic(critic, parallel, optimizer, SCHEDULE, total_steps=6),
    )


def step(learner: Actor | Critic, parallel: ParallelConfig, seed: int) -> tuple[float, float]:
    sequences = make_sequences(seed)
    total = sum(sum(s.fields["loss_mask"]) for s in sequences)

    def loss(outputs, microbatch: PackedMicrobatch):
        mask = microbatch.fields["loss_mask"].float()
        error = -outputs[0] if isinstance(learner, Actor) else 0.5 * (outputs - 1.0) ** 2
        return (error * mask).sum() / total, {}

    mine = balance([len(s) for s in sequences], learner.runtime.dp_size)[learner.runtime.dp_rank]
    result = learner.train_step(pack_all([sequences[i] for i in mine], 160, *rounding(parallel)), loss)
    return result.metrics["loss"], result.grad_norm


def train(
    hf: Path,
    folder: Path,
    parallel: ParallelConfig,
    steps: range,
    save_at: int = 0,
    dtype: Dtype = "float32",
    **options,
) -> list[tuple[float, float]]:
    actor, critic = start(hf, parallel, dtype)
    checkpoints = checkpoint_folder(folder, hf, **options)
    if steps.start:
        resumed = checkpoints.resume({"actor": actor, "critic": critic})
        assert resumed is not None and resumed.iteration == steps.start
        assert resumed.state == {"cursor": [1, 2]}
    history = []
    for i in steps:
        history += [step(actor, parallel, i), step(critic, parallel, i)]
        checkpoints.poll()
        if i + 1 == save_at:
            checkpoints.save(i + 1, {"actor": actor, "critic": critic}, {"cursor": [1, 2]})
    checkpoints.finish()
    return history
