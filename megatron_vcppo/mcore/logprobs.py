"""Log-probabilities and entropy from logits that are split over the vocabulary, without gathering them."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

# Rows are worked on in chunks of about this many logits, which bounds the float32 temporaries: on a CPU to its cache.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


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
    shared = group if dist.get_world_size(group) > 1 else None
    return _VocabParallelLogprobs.apply(logits, labels, shared, first, columns, 1.0 / temperature)


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
        if group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)

        sums = torch.zeros(3, len(labels), device=logits.device)  # Σ exp x, Σ x exp x, x of the label
        for rows in _row_chunks(valid):
            x = _shifted(valid[rows], scale, peak[rows])
            sums[2, rows] = torch.where(mine[rows], x.gather(1, local[rows, None]).squeeze(1), 0.0)
            e = x.exp()
            sums[0, rows] = e.sum(dim=1)
            sums[1, rows] = x.mul_(e).sum(dim=1)
        if group is not None:
            dist.all_reduce(sums, group=group)

        log_z = sums[0].log()
        mean_x = sums[1] / sums[0]
        ctx.save_for_backward(logits, peak + log_z, log_z - mean_x, local, mine)
        ctx.columns, ctx.scale = columns, scale
        ctx.set_materialize_grads(False)
        return sums[2] - log_z, log_z - mean_x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprob, grad_entropy = grads
        logits, log_norm, entropy, local, mine = ctx.saved_tensors
        columns, scale = ctx.columns, ctx.scale
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(log_norm)
        grad = torch.empty_like(logits)
        grad[:, columns:] = 0
        for rows in _row_chunks(logits[:, :columns]):
            log_p = _shifted(logits[rows, :columns], scale, log_norm[rows])
            # Both terms are -p · (…), to which the chain rule's scale belongs.
            factor = grad_logprob[rows, None] * -scale
            if grad_entropy is not None:
                factor = (log_p + entropy[rows, None]).mul_(grad_entropy[rows, None] * -scale).add_(factor)
            g = log_p.exp_().mul_(factor)
            at_label = torch.where(mine[rows], grad_logprob[rows] * scale, 0.0)
            grad[rows, :columns] = g.scatter_add_(1, local[rows, None], at_label[:, None])
        return grad, None, None, None, None, None


def _shifted(logits: Tensor, scale: float, shift: Tensor) -> Tensor:
    """logits · scale - shift in new float32 memory; logits [rows, columns], shift [rows]."""
    if logits.dtype == torch.float32:
        return torch.sub(logits if scale == 1.0 else logits * scale, shift[:, None])
    return logits.float().mul_(scale).sub_(shift[:, None])


def _row_chunks(logits: Tensor) -> list[slice]:
    num_rows, num_columns = logits.shape
    if num_columns == 0:
        return []
    step = max(1, _CHUNK_ELEMENTS[logits.device.type] // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
