"""One rank of the checkpoint benchmark: trains a step, saves, trains on, loads; returns time, bytes and memory."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

LENGTH = 128
"""Tokens of a step: enough to fill gradients and moments."""
SAMPLE_S = 0.01


def measure(rank: int, config: Any, folder: Path) -> dict[str, float]:
    """Seconds and MiB: see ``checkpoint.run``."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    from megatron_vcppo.config import CheckpointConfig, OptimizerConfig, ScheduleConfig
    from megatron_vcppo.data.packer import Packer
    from megatron_vcppo.hf.architecture import Architecture
    from megatron_vcppo.mcore import runtime
    from megatron_vcppo.mcore.checkpoint import CheckpointFolder, load_learner
    from megatron_vcppo.mcore.learner import Actor
    from megatron_vcppo.mcore.model import build_actor
    from megatron_vcppo.records import TrainSequence
    from megatron_vcppo.stages.training_losses import TokenLoss

    torch.set_num_threads(1)
    parallel = config.parallel
    world = runtime.start(parallel, seed=0, timeout_s=600)
    arch = Architecture.from_hf(config.model.hf)
    ids = torch.randint(arch.vocab_size, (world.dp_size, LENGTH)).tolist()
    batch = [TrainSequence(tuple(row), {"loss_mask": (False,) + (True,) * (LENGTH - 1)}) for row in ids]
    microbatches = Packer(LENGTH, parallel.tp, world.dp_rank, world.dp_size).pack(batch, {"loss_mask": bool})
    actor = Actor(build_actor(arch, config.model, parallel), parallel, OptimizerConfig(), ScheduleConfig(), 100)

    def step() -> None:
        assert actor.train_step(microbatches, TokenLoss(len(batch) * (LENGTH - 1))).applied

    step()
    _, step_mib = _peak_mib(step)
    settings = CheckpointConfig(save_every=1, async_save=config.sft.checkpoint.async_save)
    checkpoints = CheckpointFolder(folder, config, settings)
    checkpoints.save(1, {"actor": actor}, {})  # the first save also pays for imports and plans
    checkpoints.finish()
    waits: dict[str, float] = {}

    def save() -> None:
        started = time.monotonic()
        checkpoints.save(2, {"actor": actor}, {})
        waits["wait_s"] = time.monotonic() - started
        if settings.async_save:
            step()
        checkpoints.finish()
        waits["complete_s"] = time.monotonic() - started

    held_mib, save_mib = _peak_mib(save)
    started = time.monotonic()
    _, load_mib = _peak_mib(lambda: load_learner(actor, folder / "iter_0000002" / "actor"))
    waits["load_s"] = time.monotonic() - started
    runtime.stop()
    memory = {"held_mib": held_mib, "step_extra_mib": step_mib, "save_extra_mib": save_mib, "load_extra_mib": load_mib}
    return waits | memory


def _peak_mib(function: Callable[[], object]) -> tuple[float, float]:
    """(memory before, its highest rise during the function) of this process and those it started."""
    before = _tree_mib()
    highest, done = before, threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(SAMPLE_S):
            highest = max(highest, _tree_mib())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return before, highest - before


def _tree_mib() -> float:
    """Proportional set size: pages that a process shares with those it was forked from count once."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            with open(f"/proc/{process.pid}/smaps_rollup") as rollup:
                total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        except (OSError, StopIteration):  # it has just ended
            continue
    return total / 1024
