"""One rank of the memory benchmark: builds the models of a stage, trains two steps, returns the bytes that it held."""

import gc
import os
from typing import Any

from tools.benchmarks._measure import peak_bytes, status_bytes

MICROBATCHES = 2


def measure(rank: int, config: Any, stage: str) -> tuple[int, int]:
    """(held between steps, held at most during one) in bytes, beyond what the process holds before it has a model."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    from megatron_vcppo.config import OptimizerConfig, ScheduleConfig
    from megatron_vcppo.data.packer import Packer
    from megatron_vcppo.hf.architecture import Architecture
    from megatron_vcppo.launch.memory_plan import models_of
    from megatron_vcppo.mcore import runtime
    from megatron_vcppo.mcore.learner import Actor, Critic
    from megatron_vcppo.mcore.lora import share_base
    from megatron_vcppo.mcore.model import build_actor, build_critic
    from megatron_vcppo.records import TrainSequence
    from megatron_vcppo.stages.training_losses import TokenLoss

    torch.set_num_threads(1)
    parallel = config.parallel
    world = runtime.start(parallel, seed=0, timeout_s=300)
    arch = Architecture.from_hf(config.model.hf)
    packer = Packer(parallel.tokens_per_microbatch, parallel.tp, world.dp_rank, world.dp_size)
    length = parallel.tokens_per_microbatch // 2
    ids = torch.randint(arch.vocab_size, (2 * MICROBATCHES, length)).tolist()
    batch = [TrainSequence(tuple(row), {"loss_mask": (False,) + (True,) * (length - 1)}) for row in ids]
    microbatches = packer.pack(batch, {"loss_mask": bool})
    assert len(microbatches) == MICROBATCHES, "micro-batches are full"

    def critic_loss(values: torch.Tensor, microbatch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return (values - 1).square().sum() / (MICROBATCHES * 2 * length), {}

    warm_up = build_actor(arch, config.model, parallel)  # libraries allocate at their first use
    del warm_up
    gc.collect()  # adapters and their layers refer to each other
    before = status_bytes("VmRSS")
    settings = (parallel, OptimizerConfig(), ScheduleConfig(), 2)
    trained, frozen = models_of(config, stage)
    kept: list[Any] = []

    def build(kind: str) -> Any:
        model: Any = (build_actor if kind == "actor" else build_critic)(arch, config.model, parallel)
        if model.adapters is not None and kept:
            share_base(model, kept[0])
        kept.append(model)
        return model

    for kind in frozen:
        build(kind)
    learners: list[tuple[Any, Any]] = []
    for kind in trained:
        if kind == "actor":
            learners.append((Actor(build(kind), *settings), TokenLoss(len(batch) * (length - 1))))
        else:
            learners.append((Critic(build(kind), *settings), critic_loss))

    def step() -> None:
        for learner, loss in learners:
            assert learner.train_step(microbatches, loss).applied

    step()  # untouched zeros take no memory: only a step fills gradients and moments
    held = status_bytes("VmRSS")
    peak = held + peak_bytes(step)
    kept.clear()
    runtime.stop()
    return held - before, peak - before
