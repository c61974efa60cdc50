"""Vocab-parallel log-probs and entropy against log_softmax over the whole vocabulary, and the gradients of both."""

import pytest
import torch

from megatron_vcppo.config import ParallelConfig
from megatron_vcppo.mcore import logprob_rows_cpu, runtime
from megatron_vcppo.mcore import logprobs as ours
from tests.helpers.distributed import run_distributed_test

ROWS = 11
TOLERANCE = 1e-5
"""Relative, or absolute below 1: float32 holds logits of a thousand to 6e-5."""


def make_logits(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Some rows have logits of hundreds, whose exponentials overflow."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.tensor([1.0, 300.0]).repeat(ROWS)[:ROWS, None]
    return (torch.randn(ROWS, columns, generator=generator) * scale).to(dtype)


def reference(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, temperature: float) -> tuple:
    log_p = (logits[:, :vocab_size].double() / temperature).log_softmax(1)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_log_softmax_with_its_gradients(tp: int) -> None:
    # (vocabulary, columns of all ranks): without padding, with some, and with a last rank of padding alone
    sizes = [(32, 32), (29, 32), (23, 32)]

    def body() -> list[float]:
        me = runtime.start(ParallelConfig(tp=tp), seed=0, timeout_s=60).tp_rank
        worst = []
        for vocab_size, columns in sizes:
            labels = torch.arange(ROWS) * 7 % vocab_size
            labels[-1] = vocab_size - 1
            width = columns // tp
            mine = slice(me * width, (me + 1) * width)
            for temperature in (1.0, 0.7):
                for chunk in (1 << 17, 3 * width, 1):
                    logprob_rows_cpu._CHUNK_ELEMENTS = chunk
                    whole = make_logits(columns, torch.float32).requires_grad_()
                    part = whole.detach()[:, mine].clone().requires_grad_()
                    expected = reference(whole, labels, vocab_size, temperature)
                    actual = ours.vocab_parallel_logprobs(part, labels, vocab_size, temperature)
                    weights = torch.linspace(-1, 2, ROWS), torch.linspace(0.5, -1, ROWS)
                    for outputs in (expected, actual):
                        torch.autograd.backward([(w * x).sum() for w, x in zip(weights, outputs, strict=True)])
                    assert part.grad is not None and whole.grad is not None
                    pairs = [*zip(actual, expected, strict=True), (part.grad, whole.grad[:, mine])]
                    for a, b in pairs:
                        assert a.isfinite().all()
                        worst.append(float(((a - b).abs() / (1 + b.abs())).max()))
        return worst

    for errors in run_distributed_test(body, tp):
        assert len(errors) == len(sizes) * 2 * 3 * 3 and max(errors) <= TOLERANCE


def test_bfloat16_logits_are_summed_in_float32() -> None:
    def body() -> tuple[float, torch.dtype, torch.dtype]:
        me = runtime.start(ParallelConfig(tp=2), seed=0, timeout_s=60).tp_rank
        logits = make_logits(64, torch.bfloat16)
        labels = torch.arange(ROWS)
        part = logits[:, me * 32 : me * 32 + 32].clone().requires_grad_()
        logprobs, entropy = ours.vocab_parallel_logprobs(part, labels, 64)
        (logprobs + entropy).sum().backward()
        expected = reference(logits, labels, 64, 1.0)
        worst = max(
            float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip((logprobs, entropy), expected, strict=True)
        )
        assert part.grad is not None
        return worst, logprobs.dtype, part.grad.dtype

    for worst, dtype, grad_dtype in run_distributed_test(body, 2):
        assert worst <= TOLERANCE and dtype == torch.float32 and grad_dtype == torch.bfloat16
