"""Sums and moments over valid tokens.

Masked places may hold anything, NaN included: they are filled or selected away, never multiplied by zero.
"""

import torch
from torch import Tensor


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """(count, Σx, Σx²) of the valid tokens, float64 [3]: add them over micro-batches and ranks.

    x: numbers or bool, any shape; mask: bool, the same shape.
    """
    x = x.detach().masked_fill(~mask, 0).double()
    return torch.stack((mask.sum().double(), x.sum(), x.square().sum()))


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance from (count, Σx, Σx²) [..., 3]; 0 and 0 where the count is 0."""
    count, total, squares = moments.unbind(-1)
    count = count.clamp(min=1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def last_valid(mask: Tensor) -> Tensor:
    """Bool [B, T]: only the last True of each row of ``mask`` [B, T]; an empty row stays empty."""
    after = mask.flip(1).cumsum(1).flip(1)
    return mask & (after == 1)


def first_of_row(mask: Tensor) -> Tensor:
    """Bool [B, T]: only the first True of each row of ``mask`` [B, T]; an empty row stays empty."""
    return mask & (mask.cumsum(1) == 1)


def valid_index(mask: Tensor) -> Tensor:
    """int64 [B, T]: how many valid tokens lie before each token of its row (gaps do not count)."""
    return mask.cumsum(1) - mask.long()


def check_finite(mask: Tensor, **tensors: Tensor | None) -> None:
    """Raises FloatingPointError if a tensor has NaN or inf on valid tokens, with the names and how many there are.

    mask and each tensor: the same shape; None is skipped. Waits for the device once.
    """
    given = {name: x.detach() for name, x in tensors.items() if x is not None}
    nan = torch.stack([(x.isnan() & mask).sum() for x in given.values()])
    infinite = torch.stack([(x.isinf() & mask).sum() for x in given.values()])
    counts = torch.stack((nan, infinite), dim=1).tolist()
    if any(map(any, counts)):
        found = [f"{name}: {a} NaN, {b} inf" for name, (a, b) in zip(given, counts, strict=True) if a or b]
        raise FloatingPointError(f"not finite on valid tokens ({int(mask.sum())} in all): " + "; ".join(found))
