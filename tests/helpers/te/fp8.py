"""8-bit tensors with one scale, as Transformer Engine's "delayed" and "current" recipes make them, in plain torch.

Blocks of scales ("blockwise") are not here: their layout is the kernels' own.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_E4M3, _E5M2 = 7, 8  # DType
_TYPES = {_E4M3: torch.float8_e4m3fn, _E5M2: torch.float8_e5m2}


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """The quantizer's Float8Tensor of a tensor, or ``out`` with new content; a quantizer's amax is raised."""
    kind = _TYPES[int(quantizer.dtype)]
    largest = torch.finfo(kind).max
    amax = tensor.detach().float().abs().amax() if tensor.numel() else torch.zeros(())
    if hasattr(quantizer, "scale"):  # delayed
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax).view_as(quantizer.amax))
        scale = quantizer.scale.float().reshape(1)
    else:
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = torch.where(amax > 0, largest / amax, torch.ones(())).reshape(1)
    data = (tensor.detach().float() * scale).clamp(-largest, largest).to(kind).view(torch.uint8)
    if out is None:
        out = quantizer.create_tensor_from_data(data, fake_dtype=tensor.dtype, internal=quantizer.internal)
        if quantizer.columnwise_usage:
            out._create_transpose()
        if not quantizer.rowwise_usage:
            out._data = None
    else:
        if out._data is not None:
            out._data.copy_(data)
        if out._transpose is not None:
            out._transpose.copy_(fp8_transpose(data, quantizer.dtype))
            out._transpose_invalid = False
    out._scale_inv = 1 / scale
    return out


def bgrad_quantize(grad: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """(the bias's gradient, the quantized gradient)."""
    return grad.reshape(-1, grad.shape[-1]).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """bfloat16 or float32 values of a Float8Tensor."""
    return value(tensor, rowwise=True).to(tensor.dtype)


def fp8_transpose(data: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    """[…, columns] -> [columns, …], contiguous."""
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None or out.shape != turned.shape else out.copy_(turned)


def value(tensor: Any, rowwise: bool) -> Tensor:
    """Float32 values of a matrix product's operand.

    rowwise: which of its two copies a Hopper GPU reads: rows, or columns, which are stored as rows of the transpose.
    """
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.float()
    if rowwise:
        data = tensor._data
    else:
        assert tensor._transpose is not None and not tensor._transpose_invalid, "the product needs the transposed copy"
        data = tensor._transpose.movedim(0, -1).contiguous()
    assert data is not None, "the product needs the row-wise copy"
    return data.view(_TYPES[int(tensor._fp8_dtype)]).float() * tensor._scale_inv
