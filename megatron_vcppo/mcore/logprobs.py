"""Log-probabilities and entropy from logits that are split over the vocabulary, without gathering them."""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def vocab_parallel_logprobs(
    logits: Tensor, labels: Tensor, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each distribution; collective over the tensor-parallel ranks.

    logits: [T, padded vocabulary / tp], any float type; labels: [T] int64, any value in [0, vocab_size).
    vocab_size: columns beyond it (padding for tensor parallelism) get no probability.
    temperature: logits are divided by it first, as the sampler does.
    Returns (logprobs [T], entropy [T]) in float32, differentiable in logits: two all-reduces forward, none backward.
    On a CPU the backward pass, of which there can be one, writes the gradient over the logits.
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

        sums = torch.zeros(3, len(labels), device=logits.device)
        if columns:
            sums = _rows(logits).row_sums(
                logits=logits, local=local, mine=mine, columns=columns, peak=peak, scale=scale
            )
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
        grad = _rows(logits).row_gradients(
            logits=logits,
            local=local,
            mine=mine,
            columns=ctx.columns,
            log_norm=log_norm,
            entropy=entropy,
            grad_logprob=torch.zeros_like(log_norm) if grad_logprob is None else grad_logprob,
            grad_entropy=grad_entropy,
            scale=ctx.scale,
        )
        return grad, None, None, None, None, None


def _rows(logits: Tensor) -> ModuleType:
    """What computes a rank's own columns on the device of the logits; each is imported only where it is used."""
    on_gpu = logits.device.type == "cuda"
    return import_module(f"megatron_vcppo.mcore.logprob_rows_{'gpu' if on_gpu else 'cpu'}")
