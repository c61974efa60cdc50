"""Stands in for Transformer Engine's C++ module of the same name: what our models reach is plain torch.

Results are real numbers, in the precision and with the argument order that Transformer Engine 2.20's Python expects.
Any other function exists, because the package imports it, but raises NotImplementedError with its name when called;
any other class is a placeholder.
"""

import enum
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.te import fp8
from tests.helpers.te.fp8 import bgrad_quantize, dequantize, fp8_transpose, quantize  # noqa: F401

Tensors = list[list[Tensor]]


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


_TORCH_TYPES = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class _Placeholder(type):
    """A class whose members are made when they are named: enumerations that only have to differ."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        value = len([n for n in vars(cls) if not n.startswith("_")])
        setattr(cls, name, value)
        return value


def __getattr__(name: str) -> Any:
    """Names that the package wants at import, but that our models never call."""
    if name.startswith("__"):
        raise AttributeError(name)
    value: Any = _Placeholder(name, (), {}) if name[:1].isupper() else _missing(name)
    globals()[name] = value
    return value


def _missing(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no plain torch in tests/helpers/te")

    return call


def get_cudnn_version() -> int:
    """9.20: newer than anything that the package asks for."""
    return 92000


def get_cublasLt_version() -> int:
    return 130000


def get_num_cublas_streams() -> int:
    return 1


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """(op(B) op(A) · alpha [+ bias], the bias's gradient if ``grad``, None, None); sums in float32.

    A, B: […, columns]; leading dimensions are rows, and those of B are the result's unless it is transposed.
    """
    assert quantizer is None and comm_overlap is None and not gelu
    wide = (fp8.value(A, rowwise=transa), fp8.value(B, rowwise=not transb))
    a, b = (x.reshape(-1, x.shape[-1]) for x in wide)
    result = alpha * ((b.T if transb else b) @ (a.T if transa else a))
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if not transb:
        result = result.view(*wide[1].shape[:-1], result.shape[-1])
    if out is None:
        return result.to(_TORCH_TYPES[DType(out_dtype)] if out_dtype is not None else B.dtype), bias_grad, None, None
    if accumulate:
        result = result.view(out.shape) + (1.0 if beta is None else beta) * out.float()
    out.copy_(result.view(out.shape))
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    A: list[Tensor],
    transa: bool,
    B: list[Tensor],
    transb: bool,
    out: list[Tensor],
    out_dtype: int,
    m_splits: list[int],
    bias: list[Tensor],
    bias_dtype: int,
    single_output: bool,
    gelu_in: list[Tensor],
    grad: bool,
    workspaces: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> list[Tensor]:
    """``generic_gemm`` of each pair, without biases. single_output: the results are rows of one tensor."""
    parts = out[0].split(m_splits) if single_output else out
    for a, b, part in zip(A, B, parts, strict=True):
        if part.numel():
            generic_gemm(
                a, transa, b, transb, part, None, out_dtype, None, bias_dtype, False, None, grad,
                workspaces[0], workspace_size, accumulate, use_split_accumulator,
            )  # fmt: skip
    return bias


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, out_dtype: int, sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    """(x / rms(x) · weight, None, 1 / rms(x) float32 [rows])."""
    wide, weight = x.float(), weight.float() + zero_centered
    inverse_rms = (wide.square().mean(-1) + eps).rsqrt()
    result = (wide * inverse_rms[:, None] * weight).to(_TORCH_TYPES[DType(out_dtype)])
    if quantizer is not None:
        result = fp8.quantize(result, quantizer, out)
    elif out is not None:
        result = out.copy_(result)
    return result, None, inverse_rms


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    normed, grad = x.float() * inverse_rms[:, None], grad.float()
    weighted = grad * (weight.float() + zero_centered)
    grad_x = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * inverse_rms[:, None]
    return grad_x.to(x.dtype), (grad * normed).sum(0).to(weight.dtype)


def rmsnorm_bwd_add(
    grad: Tensor, x: Tensor, added: Tensor, inverse_rms: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """The same, with another gradient of x added."""
    grad_x, grad_weight = rmsnorm_bwd(grad, x, inverse_rms, weight, sm_margin, zero_centered)
    return grad_x + added.view_as(grad_x), grad_weight


def fused_rope_forward(
    t: Tensor, freqs: Tensor, start_positions: Tensor | None, qkv_format: int, interleaved: bool,
    cu_seqlens: Tensor | None, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Rotary embedding of packed tokens t [T / cp_size, heads, d]; cu_seqlens are those of the whole segments."""
    return _rotate(t, freqs, start_positions, interleaved, cu_seqlens, cp_size, cp_rank, 1.0)


def fused_rope_backward(
    grad: Tensor, freqs: Tensor, start_positions: Tensor | None, qkv_format: int, interleaved: bool,
    cu_seqlens: Tensor | None, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """The inverse rotation."""
    return _rotate(grad, freqs, start_positions, interleaved, cu_seqlens, cp_size, cp_rank, -1.0)


def _rotate(
    t: Tensor, freqs: Tensor, start_positions: Tensor | None, interleaved: bool, cu_seqlens: Tensor | None,
    cp_size: int, cp_rank: int, sign: float,
) -> Tensor:  # fmt: skip
    assert cu_seqlens is not None and start_positions is None and not interleaved, "sequences must be packed"
    positions = []
    for length in (cu_seqlens.diff() // cp_size).tolist():
        if cp_size == 1:
            positions.append(torch.arange(length))
        else:  # an early and a late chunk
            half, last = length // 2, 2 * cp_size - 1 - cp_rank
            positions += [torch.arange(half) + chunk * half for chunk in (cp_rank, last)]
    angles = freqs[torch.cat(positions)].view(len(t), 1, -1).float()
    rotated, rest = t[..., : angles.shape[-1]].float(), t[..., angles.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return torch.cat([(rotated * angles.cos() + sign * turned * angles.sin()).to(t.dtype), rest], dim=-1)


def get_fused_attn_backend(params: Any) -> tuple[NVTE_Fused_Attn_Backend, str]:
    """cuDNN's attention for 16-bit types; float32 is left to the unfused one, as on a GPU."""
    if DType(int(params.qkv_dtype)) in (DType.kFloat16, DType.kBFloat16):
        return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""
    return NVTE_Fused_Attn_Backend.NVTE_No_Backend, "only 16-bit types"


def fused_attn_fwd(*args: Any) -> list[Tensor]:
    """[output [T, heads, d], softmax statistics (empty), state of the random numbers]."""
    scale, (cu_seqlens, _, query, key, value) = args[3], args[14:19]
    output = _causal_segments(query, key, value, cu_seqlens, scale)
    return [output, torch.empty(0), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> list[Tensor]:
    """[gradients of query, key, value]: the forward pass again, differentiated."""
    scale, (cu_seqlens, _, *inputs, _, grad_output) = args[2], args[17:24]
    with torch.enable_grad():
        query, key, value = leaves = [x.detach().requires_grad_() for x in inputs]
        output = _causal_segments(query, key, value, cu_seqlens, scale)
        return list(torch.autograd.grad(output, leaves, grad_output.view_as(output)))


def _causal_segments(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    lengths, grouped = cu_seqlens.diff().tolist(), query.shape[1] != key.shape[1]
    parts = (x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped)[0]
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()


def convert_thd_to_bshd(packed: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    """[T, heads, d] -> [batch, longest, heads, d], zeros behind each segment."""
    padded = packed.new_zeros(batch, longest, *packed.shape[1:])
    for row, part in zip(padded, packed.split(cu_seqlens.diff().tolist()), strict=True):
        row[: len(part)] = part
    return padded


def convert_bshd_to_thd(padded: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The inverse of ``convert_thd_to_bshd``."""
    return torch.cat([row[:length] for row, length in zip(padded, cu_seqlens.diff().tolist(), strict=True)])


def multi_tensor_adam(
    chunk_size: int, overflow: Tensor, tensors: Tensors, lr: float, beta1: float, beta2: float, eps: float, step: int,
    adamw: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """One AdamW step in place. tensors: gradients, parameters, first and second moments (float32)."""
    assert isinstance(step, int), f"the kernel takes the number of the step as an int, got {type(step).__name__}"
    assert adamw and len(tensors) == 4
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, first, second in zip(*tensors, strict=True):
        wide = grad.float()
        first.lerp_(wide, 1 - beta1)
        second.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
        denominator = (second / corrections[1]).sqrt() + eps
        update = first / corrections[0] / denominator + weight_decay * parameter.float()
        parameter.copy_(parameter.float() - lr * update)


def multi_tensor_scale(chunk_size: int, overflow: Tensor, tensors: Tensors, scale: float) -> None:
    """tensors: inputs, outputs."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, tensors: Tensors, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """(the norm of all [1], the norm of each [tensors] or nothing)."""
    norms = torch.stack([x.float().norm() for x in tensors[0]]) if tensors[0] else torch.zeros(1)
    return norms.norm()[None], norms if per_tensor else torch.empty(0)


__all__ = [name for name in globals() if not name.startswith("_")]
