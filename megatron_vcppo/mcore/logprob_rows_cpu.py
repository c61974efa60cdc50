"""Log-probs and entropy on the CPU: rows in chunks whose float32 temporaries stay in its cache.

Fresh memory is what costs most there: the first touch of each page takes longer than computing what is put in it.
"""

import torch
from torch import Tensor

# About this many logits make a chunk: half a megabyte, of which the allocator keeps several.
_CHUNK_ELEMENTS = 1 << 17


def row_sums(*, logits: Tensor, local: Tensor, mine: Tensor, columns: int, peak: Tensor, scale: float) -> Tensor:
    """Σ exp x, Σ x exp x and x of the label, where x = logits · scale - peak: float32 [3, T].

    logits: [T, V]; local: int64 [T], the label's column; mine: bool [T], whether the label is among the columns (the
    third sum is 0 where not); columns: how many of V count; peak: float32 [T].
    """
    sums = torch.zeros(3, len(logits))
    for rows in _row_chunks(len(logits), columns):
        x = _shifted(logits[rows, :columns], scale, peak[rows])
        sums[2, rows] = torch.where(mine[rows], x.gather(1, local[rows, None]).squeeze(1), 0.0)
        e = x.exp()
        sums[0, rows] = e.sum(dim=1)
        sums[1, rows] = x.mul_(e).sum(dim=1)
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
    """The gradient of the logits, [T, V] in their type, 0 beyond the columns: written over the logits.

    logits, local, mine, columns: as in ``row_sums``; log_norm, entropy, grad_logprob, grad_entropy: float32 [T].
    """
    logits[:, columns:] = 0
    for rows in _row_chunks(len(logits), columns):
        log_p = _shifted(logits[rows, :columns], scale, log_norm[rows])
        # Both terms are -p · (…), to which the chain rule's scale belongs.
        factor = grad_logprob[rows, None] * -scale
        if grad_entropy is not None:
            factor = (log_p + entropy[rows, None]).mul_(grad_entropy[rows, None] * -scale).add_(factor)
        g = log_p.exp_().mul_(factor)
        at_label = torch.where(mine[rows], grad_logprob[rows] * scale, 0.0)
        logits[rows, :columns] = g.scatter_add_(1, local[rows, None], at_label[:, None])
    return logits


def _shifted(logits: Tensor, scale: float, shift: Tensor) -> Tensor:
    """logits · scale - shift in new float32 memory; logits [rows, columns], shift [rows]."""
    if logits.dtype == torch.float32:
        return torch.sub(logits if scale == 1.0 else logits * scale, shift[:, None])
    return logits.float().mul_(scale).sub_(shift[:, None])


def _row_chunks(num_rows: int, num_columns: int) -> list[slice]:
    if num_columns == 0:
        return []
    step = max(1, _CHUNK_ELEMENTS // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
