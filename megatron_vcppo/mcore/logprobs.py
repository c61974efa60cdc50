"""Log-probabilities and entropy from logits that are split over the vocabulary, without gathering them."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

# Rows are worked on in chunks of about this many logits, which bounds the float32 temporaries.
_CHUNK_ELEMENTS = 1 << 24


def vocab_parallel_logprobs(
    logits: Tensor, labels: Tensor, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each distribution; collective over the tensor-parallel ranks.

    logits: [T, padded vocabulary / tp], any float type; labels: [T] int64, any value in [0, vocab_size).
    vocab_size: columns beyond it (padding for tensor parallelism) get no probability.
    temperature: logits are divided by it first, as the sampler does.
    Returns (logprobs [T], entropy [T]) in float32, differentiable in logits: two all-reduces forward, none backward.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    first = dist.get_rank(group) * logits.shape[1]
    columns = min(max(vocab_size - first, 0), logits.shape[1])
    return _VocabParallelLogprobs.apply(logits, labels, group, first, columns, 1.0 / temperature)


class _VocabParallelLogprobs(torch.autograd.Function):
    """With z = logits / temperature, x = z - max z and p = softmax(z):
    log p_y = x_y - log Σ exp x, H = log Σ exp x - Σ p x, ∂log p_y/∂z = 1_y - p, ∂H/∂z = -p (x - Σ p x).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: Any, first: int, columns: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        valid = logits[:, :columns]
        local = labels - first
        mine = (local >= 0) & (local < columns)
        local = local.clamp(0, max(columns - 1, 0))
        peak = torch.full(labels.shape, -torch.inf, device=logits.device)
        if columns:
            peak = valid.amax(dim=1).float() * scale
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)

        sums = torch.zeros(3, len(labels), device=logits.device)  # Σ exp x, Σ x exp x, x of the label
        for rows in _row_chunks(len(labels), columns):
            x = valid[rows].to(torch.float32, copy=True).mul_(scale).sub_(peak[rows, None])
            sums[2, rows] = torch.where(mine[rows], x.gather(1, local[rows, None]).squeeze(1), 0.0)
            e = x.exp()
            sums[0, rows] = e.sum(dim=1)
            sums[1, rows] = torch.linalg.vecdot(e, x)
        dist.all_reduce(sums, group=group)

        log_z = sums[0].log()
        mean_x = sums[1] / sums[0]
        ctx.save_for_backward(logits, peak + log_z, log_z - mean_x, local, mine)
        ctx.columns, ctx.scale = columns, scale
        return sums[2] - log_z, log_z - mean_x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprob, grad_entropy = grads
        logits, log_norm, entropy, local, mine = ctx.saved_tensors
        columns, scale = ctx.columns, ctx.scale
        grad = torch.zeros_like(logits)
        for rows in _row_chunks(len(local), columns):
            log_p = logits[rows, :columns].to(torch.float32, copy=True).mul_(scale).sub_(log_norm[rows, None])
            # Both terms are -p · (…): one pass.
            factor = grad_logprob[rows, None] + grad_entropy[rows, None] * (log_p + entropy[rows, None])
            g = log_p.exp_().mul_(factor).neg_()
            g.scatter_add_(1, local[rows, None], torch.where(mine[rows], grad_logprob[rows], 0.0)[:, None])
            grad[rows, :columns] = g.mul_(scale).to(grad.dtype)
        return grad, None, None, None, None, None


def _row_chunks(num_rows: int, num_columns: int) -> list[slice]:
    if num_columns == 0:
        return []
    step = max(1, _CHUNK_ELEMENTS // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
