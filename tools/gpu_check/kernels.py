"""GAE within twice the time of a copy, and log-probs over a large vocabulary against plain PyTorch."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from tools.benchmarks import gae
from tools.benchmarks._measure import peak_bytes
from tools.gpu_check.card import best_s
from tools.gpu_check.rows import Row, at_most

GAE_SHAPES = {"full": ["128x8192", "512x16384"], "tiny": ["4x64"]}
LOGITS = {"full": (8192, 151936), "tiny": (64, 1000)}
"""Tokens, vocabulary (Qwen2.5's)."""


def run(target: str, size: str) -> list[Row]:
    """Both kernels."""
    return [*advantages(target, size), *logprobs(target, size)]


def advantages(target: str, size: str) -> list[Row]:
    """``tools/bench.py gae --device cuda``; correct means: as the oracle says, on rows that it can walk."""
    parser = argparse.ArgumentParser()
    gae.add_arguments(parser)
    args = parser.parse_args(["--shapes", *GAE_SHAPES[size], "--device", target, "--repeats", "20"])
    rows = [at_most(f"GAE {case['shape']}, time of copies", float(str(case["ours_over_copy"])), 2.0)
            for case in gae.run(args)]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 2000, generator=generator).to(target).unbind()
    mask = gae.make_mask(4, 2000, "gaps", generator).to(target)
    return [*rows, at_most("GAE, largest error", gae.largest_error(rewards, values, mask, (1.0, 0.95, 1.0)), 1e-3)]


def logprobs(target: str, size: str) -> list[Row]:
    """Forward and backward of log-probs in bf16: time, memory and error compared with float32 log_softmax."""
    from megatron_vcppo.config import ParallelConfig
    from megatron_vcppo.mcore import runtime
    from megatron_vcppo.mcore.logprobs import vocab_parallel_logprobs

    runtime.start(ParallelConfig(), seed=0, timeout_s=60)
    tokens, vocabulary = LOGITS[size]
    generator = torch.Generator(target).manual_seed(0)
    logits = torch.randn(tokens, vocabulary, dtype=torch.bfloat16, device=target, generator=generator)
    logits.requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device=target, generator=generator)

    def both(function: Callable[[], Tensor]) -> Callable[[], object]:
        def work() -> None:
            function().sum().backward()
            logits.grad = None  # not left for the next call to free

        return work

    def ours() -> Tensor:
        return vocab_parallel_logprobs(logits, labels, vocabulary)[0]

    def plain() -> Tensor:
        return logits.float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)

    with torch.no_grad():
        error = float((ours() - plain()).abs().max())
    sizes = [memory(both(function), target) / logits.nbytes for function in (ours, plain)]
    times = [best_s(both(function), 5) for function in (ours, plain)]
    runtime.stop()
    what = f"log-probs {tokens} × {vocabulary}"
    return [
        at_most(f"{what}, largest error", error, 1e-3),
        at_most(f"{what}, time of plain PyTorch's {1e3 * times[1]:.1f} ms", times[0] / times[1], 1.0),
        at_most(f"{what}, memory in logits' (plain PyTorch: {sizes[1]:.1f})", sizes[0], 2.0),
    ]


def memory(work: Callable[[], object], target: str) -> int:
    """How far a call raises memory: the device's, or this process's."""
    work()
    if target == "cpu":
        return peak_bytes(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before
