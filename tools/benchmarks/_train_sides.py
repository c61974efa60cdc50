"""The two sides of the training benchmark: processes that build a model, then do one optimizer step whenever asked."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], float]
"""One optimizer step over the whole batch; returns its loss."""
PROMPT_TOKENS = 4
"""Tokens at the beginning of each sequence that carry no loss."""
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Work:
    """What both sides train on."""

    hf: Path
    sequences: list[list[int]]
    dtype: str
    threads: int
    """Per process."""
    layout: dict[str, int]
    """tp, pp, dp of the Megatron side."""
    tokens_per_microbatch: int
    recompute: str
    reference_batch: int
    """Sequences that transformers pads to one length."""


def serve(connection: Connection, side: str, work: Work, environment: dict[str, str]) -> None:
    """Build a side; then one step for each message, answered by (loss, processor seconds)."""
    os.environ.update(environment)
    torch.set_num_threads(work.threads)
    step = {"megatron": megatron_side, "transformers": transformers_side}[side](work)
    connection.send(None)
    while connection.recv():
        began = time.process_time()
        loss = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        connection.send((loss, time.process_time() - began))


def megatron_side(work: Work) -> Step:
    """This rank of the actor: packing (part of every step's work), forward, backward, AdamW."""
    from megatron_vcppo.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
    from megatron_vcppo.data.context import rounding
    from megatron_vcppo.data.rollout_batch import Packing
    from megatron_vcppo.mcore import runtime
    from megatron_vcppo.mcore.architecture import Architecture
    from megatron_vcppo.mcore.hf_load import load_hf
    from megatron_vcppo.mcore.learner import Actor
    from megatron_vcppo.mcore.model import build_actor
    from megatron_vcppo.records import Sequence
    from megatron_vcppo.stages.sft import TokenLoss

    layout: dict[str, Any] = dict(work.layout)
    parallel = ParallelConfig(
        **layout,
        sequence_parallel=work.layout["tp"] > 1,
        distributed_optimizer=work.layout["dp"] * work.layout["cp"] > 1,
        recompute=work.recompute,  # type: ignore[arg-type]
        tokens_per_microbatch=work.tokens_per_microbatch,
    )
    world = runtime.start(parallel, seed=0, timeout_s=600)
    model = build_actor(
        Architecture.from_hf(work.hf),
        ModelConfig(hf=str(work.hf), dtype=work.dtype),  # type: ignore[arg-type]
        parallel,
    )
    load_hf(model, work.hf)
    actor = Actor(model, parallel, OptimizerConfig(lr=LEARNING_RATE), ScheduleConfig(), total_steps=1)
    multiple, segment_multiple = rounding(parallel)
    packing = Packing(parallel.tokens_per_microbatch, multiple, world.dp_rank, world.dp_size, segment_multiple)
    sequences = [
        Sequence(tuple(ids), {"loss_mask": (False,) * PROMPT_TOKENS + (True,) * (len(ids) - PROMPT_TOKENS)})
        for ids in work.sequences
    ]
    num_loss_tokens = sum(len(ids) - PROMPT_TOKENS for ids in work.sequences)

    def step() -> float:
        mine = [sequences[i] for i in packing.share([len(s) for s in sequences])]
        result = actor.train_step(packing.pack(mine, ["loss_mask"]), TokenLoss(num_loss_tokens))
        assert result.applied, f"not finite: {result}"
        return result.metrics["loss"]

    return step


def transformers_side(work: Work) -> Step:
    """The same in transformers: micro-batches padded to their longest, its own loss, clipping, fused AdamW."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(work.hf, dtype=getattr(torch, work.dtype)).to(device).train()
    if work.recompute == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
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
