"""The two sides of the training benchmark: processes that build a model, then do one optimizer step per message."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_vcppo.hf.architecture import Architecture

Step = Callable[[], float]
"""One optimizer step over the whole batch; returns its loss."""
PROMPT_TOKENS = 4
"""Tokens at the beginning of each sequence that carry no loss."""
SIDES = ("megatron", "transformers")
GIB = 1 << 30


@dataclass(frozen=True)
class Work:
    """What both sides train on."""

    hf: Path | None
    """None: Megatron's random initial weights."""
    arch: Architecture
    sequences: list[list[int]]
    model: dict[str, Any]
    """Keys of the section ``model``: dtype, and what the Megatron side has besides."""
    threads: int
    """Per process."""
    layout: dict[str, int]
    """tp, pp, dp of the Megatron side."""
    tokens_per_microbatch: int
    recompute: str
    own_layers: bool
    """Without Transformer Engine, also where it is installed."""
    learning_rate: float
    reference_batch: int
    """Sequences that transformers pads to one length."""


@dataclass(frozen=True)
class Answer:
    """A process's answer after a step."""

    loss: float
    cpu_s: float
    """Processor seconds of this step."""
    peak_gib: float | None
    """The most device memory that tensors took so far; None on a CPU."""
    planned_gib: float | None
    """The memory plan's figure for it; None on a CPU and for transformers."""


def serve(connection: Connection, side: str, work: Work, environment: dict[str, str]) -> None:
    """Build a side; then one step and one answer for each message."""
    os.environ.update(environment)
    if work.own_layers:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment] # what Python takes for "not installed"
    torch.set_num_threads(work.threads)
    step = {"megatron": megatron_side, "transformers": transformers_side}[side](work)
    on_gpu = torch.cuda.is_available()
    planned = planned_gib(work) if on_gpu and side == "megatron" else None
    connection.send(None)
    while connection.recv():
        began = time.process_time()
        loss = step()
        peak = None
        if on_gpu:
            torch.cuda.synchronize()
            peak = round(torch.cuda.max_memory_allocated() / GIB, 2)
        connection.send(Answer(loss, time.process_time() - began, peak, planned))


def planned_gib(work: Work) -> float:
    """What launch/memory_plan.py expects of tensors on the fullest rank, less its allowance for CUDA's memory."""
    from megatron_vcppo.config import Config
    from megatron_vcppo.launch.memory_plan import plan
    from megatron_vcppo.mcore.layers import uses_transformer_engine

    config = Config()
    config.model.dtype = work.model["dtype"]
    config.model.max_length = max(map(len, work.sequences))
    config.parallel = parallel_config(work)
    # The plan takes fused layers as a sign of a GPU cluster.
    ranks = config.parallel.tp * config.parallel.pp * config.parallel.cp * (config.parallel.dp or 1)
    config.cluster.gpus_per_node = ranks if uses_transformer_engine(config.model) else 0
    parts = plan(work.arch, config, "sft")
    return round(sum(size for part, size in parts.items() if part != "overhead"), 2)


def parallel_config(work: Work) -> Any:
    """The section ``parallel`` of the layout."""
    from megatron_vcppo.config import ParallelConfig

    layout: dict[str, Any] = dict(work.layout)
    return ParallelConfig(
        **layout,
        sequence_parallel=layout["tp"] > 1,
        distributed_optimizer=layout["dp"] * layout["cp"] > 1,
        recompute=work.recompute,  # type: ignore[arg-type]
        tokens_per_microbatch=work.tokens_per_microbatch,
    )


def megatron_side(work: Work) -> Step:
    """This rank of the actor: packing (part of every step's work), forward, backward, AdamW."""
    from megatron_vcppo.config import ModelConfig, OptimizerConfig, ScheduleConfig
    from megatron_vcppo.data.packer import Packer
    from megatron_vcppo.mcore import runtime
    from megatron_vcppo.mcore.hf_weights_io import load_hf
    from megatron_vcppo.mcore.learner import Actor
    from megatron_vcppo.mcore.model import build_actor
    from megatron_vcppo.records import TrainSequence
    from megatron_vcppo.stages.training_losses import TokenLoss

    parallel = parallel_config(work)
    world = runtime.start(parallel, seed=0, timeout_s=600)
    settings = ModelConfig(hf=str(work.hf), **work.model)
    model = build_actor(work.arch, settings, parallel)
    if work.hf is not None:
        load_hf(model, work.hf)
    actor = Actor(model, parallel, OptimizerConfig(lr=work.learning_rate), ScheduleConfig(), total_steps=1)
    packer = Packer.of(parallel, settings, world.dp_rank, world.dp_size)
    sequences = [
        TrainSequence(tuple(ids), {"loss_mask": (False,) * PROMPT_TOKENS + (True,) * (len(ids) - PROMPT_TOKENS)})
        for ids in work.sequences
    ]
    num_loss_tokens = sum(len(ids) - PROMPT_TOKENS for ids in work.sequences)

    def step() -> float:
        mine = [sequences[i] for i in packer.shard([len(s) for s in sequences])]
        result = actor.train_step(packer.pack(mine, {"loss_mask": bool}), TokenLoss(num_loss_tokens))
        assert result.applied, f"not finite: {result}"
        return result.metrics["loss"]

    return step


def transformers_side(work: Work) -> Step:
    """The same in transformers: micro-batches padded to their longest, its own loss, clipping, fused AdamW."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(work.hf, dtype=getattr(torch, work.model["dtype"])).to(device).train()
    if work.recompute == "full":
        model.gradient_checkpointing_enable()
    settings: dict[str, Any] = {"lr": work.learning_rate, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    num_loss_tokens = sum(len(ids) - PROMPT_TOKENS for ids in work.sequences)
    size = work.reference_batch
    batches = [work.sequences[i : i + size] for i in range(0, len(work.sequences), size)]

    def step() -> float:
        total = torch.zeros((), device=device)
        for batch in batches:
            longest = max(map(len, batch))
            ids, mask, labels = (torch.full((len(batch), longest), fill) for fill in (0, 0, -100))
            for row, sequence in enumerate(batch):
                ids[row, : len(sequence)] = torch.tensor(sequence)
                mask[row, : len(sequence)] = 1
                labels[row, PROMPT_TOKENS : len(sequence)] = ids[row, PROMPT_TOKENS : len(sequence)]
            loss = model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                labels=labels.to(device),
                num_items_in_batch=num_loss_tokens,
                use_cache=False,
            ).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step
