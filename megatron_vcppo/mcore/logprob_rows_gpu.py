"""GPU kernels of log-probs and entropy: each reads the logits once, in their own type, and computes in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def row_sums(*, logits: Tensor, local: Tensor, mine: Tensor, columns: int, peak: Tensor, scale: float) -> Tensor:
    """As ``logprob_rows_cpu.row_sums``."""
    sums = torch.empty(3, len(logits), device=logits.device)
    if len(logits):
        _row_sums[(len(logits),)](
            logits, logits.stride(0), local, mine, peak, sums, len(logits), columns, scale, BLOCK=_BLOCK, num_warps=8
        )
    return sums


def row_gradients(
    *,
    logits: Tensor,
    local: Tensor,
    mine: Tensor,
    columns: int,
    log_norm: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    scale: float,
) -> Tensor:
    """As ``logprob_rows_cpu.row_gradients``."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    num_rows, width = logits.shape
    grad_entropy = torch.zeros_like(log_norm) if grad_entropy is None else grad_entropy
    if grad.numel():
        _row_gradients[(num_rows, triton.cdiv(width, _BLOCK))](
            logits, logits.stride(0), local, mine, log_norm, entropy, grad_logprob.contiguous(),
            grad_entropy.contiguous(), grad, width, columns, scale, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return grad


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    logits, stride, local, mine, peak, sums, num_rows, columns, scale, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    shift = tl.load(peak + row)
    exps, products = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(start + column, inside, other=0.0).to(tl.float32) * scale - shift
        e = tl.where(inside, tl.exp(x), 0.0)
        exps += e
        # Below -103 the exponential is 0 in float32; a logit of -inf must give 0, not NaN.
        products += tl.where(e > 0.0, x * e, 0.0)
    tl.store(sums + row, tl.sum(exps, axis=0))
    tl.store(sums + num_rows + row, tl.sum(products, axis=0))
    at_label = tl.load(start + tl.load(local + row)).to(tl.float32) * scale - shift
    tl.store(sums + 2 * num_rows + row, tl.where(tl.load(mine + row) != 0, at_label, 0.0))


@triton.jit
def _row_gradients(  # type: ignore[no-untyped-def]
    logits, stride, local, mine, log_norm, entropy, grad_logprob, grad_entropy, grad, width, columns, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + column, column < columns, other=0.0).to(tl.float32)
    log_p = x * scale - tl.load(log_norm + row)
    p = tl.exp(log_p)
    for_logprob, for_entropy = tl.load(grad_logprob + row), tl.load(grad_entropy + row)
    of_entropy = tl.where(p > 0.0, p * (log_p + tl.load(entropy + row)), 0.0)
    g = -p * for_logprob - of_entropy * for_entropy
    is_label = (column == tl.load(local + row)) & (tl.load(mine + row) != 0)
    g = tl.where(column < columns, (g + tl.where(is_label, for_logprob, 0.0)) * scale, 0.0)
    tl.store(grad + row.to(tl.int64) * width + column, g.to(grad.dtype.element_ty), column < width)
