"""What the Triton kernels share: activations, the epilogue, the order of tiles, and what all of them decline.

Everything on the device is float32 arithmetic. The activations pass NaN on and make none of a finite argument; -inf
becomes NaN under gelu and silu, as it does in PyTorch. ``activate`` is the device's side of
``activation.apply_activation``, ``finish_tile`` of ``epilogue.finish``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from typing_extensions import Unpack

from tilewright.kernels.activation import TRITON_ACTIVATIONS
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES

#: Longest sum of products of int8 in [-127, 127] that cannot leave int32.
MAX_K = (2**31 - 1) // 127**2
TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
}


def why_not_on_gpu(problem: Problem) -> str | None:
    """Why no Triton kernel of ours runs on the problem's device, or None."""
    if problem.device != "cuda":
        return f"runs on a GPU, the tensors are on {problem.device!r}"
    if problem.capability is not None and problem.capability < (8, 0):
        major, minor = problem.capability
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    if problem.activation not in TRITON_ACTIVATIONS:
        return f"does not have the activation {problem.activation}"
    return None


def why_not_float_rows(problem: Problem) -> str | None:
    """The same for a kernel that reads floats and multiplies nothing."""
    if problem.x_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype}"
    return why_not_on_gpu(problem)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, negative_slope=0.01):
    """``x`` float32 of any shape through the activation named ``ACTIVATION`` (of ``activation.TRITON_ACTIVATIONS``)."""
    if ACTIVATION == "relu":
        # Not tl.maximum, which takes the number and drops the NaN.
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): where exp overflows the quotient is 0, its limit.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * u))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "hardswish":
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x < 0, x * negative_slope, x)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def finish_tile(
    y,
    out_ptr,
    bias_ptr,
    residual_ptr,
    row,
    column,
    M,
    N,
    stride_residual_m,
    stride_residual_n,
    ACTIVATION: tl.constexpr,
):
    """out[row, column] = activation(y + bias[column]) + residual[row, column], in float32, with one cast at the end.

    y: float32 tile. row, column: int32 indices that broadcast to its shape, so that a tile may lie either way: [BM, 1]
    and [1, BN], or [1, BM] and [BN, 1]. out: contiguous [M, N]; its dtype is the dtype of the result. bias: [N] or
    None. residual: [M, N] of any strides or None. Nothing outside [0, M) x [0, N) is read or written.
    """
    inside = (row < M) & (column < N)
    wide_row = row.to(tl.int64)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if residual_ptr is not None:
        offset = wide_row * stride_residual_m + column.to(tl.int64) * stride_residual_n
        y += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + wide_row * N + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grouped_tile(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row of tiles, column of tiles) of a program: ``GROUP_M`` rows of tiles are walked column by column.

    Programs that run at the same time then share rows of both operands, which stay in the L2 cache.
    """
    group_size = GROUP_M * tiles_n
    first = program // group_size * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = program % group_size
    return first + within % rows, within // rows


@triton.jit
def halves(acc):
    """The left and the right half of the columns of ``acc`` [BM, BN]."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def slice_of(acc, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """Slice ``INDEX`` of ``PARTS`` equal slices of the columns. Unrolled by hand: Triton 3.4 takes no recursion."""
    tl.static_assert(PARTS <= 4, "the epilogue takes 1, 2 or 4 parts")
    if PARTS > 1:
        left, right = halves(acc)
        acc = left if INDEX < PARTS // 2 else right
    if PARTS > 2:
        left, right = halves(acc)
        acc = left if INDEX % 2 == 0 else right
    return acc


def named_kernel(function: Any, name: str) -> Any:
    """``function`` as a kernel that profilers and tables know by ``name``: what serves several operators is a kernel of
    each.
    """
    kernel = triton.jit(function, do_not_specialize=["M"], repr=lambda specialization: name)
    if isinstance(kernel, triton.JITFunction):  # the interpreter's is nameless
        kernel.__name__ = name
    return kernel


def finish_arguments(out: torch.Tensor, **end: Unpack[End]) -> dict[str, Any]:
    """Arguments that every kernel hands on to ``finish_tile``."""
    residual = end["residual"]
    return {
        "bias_ptr": end["bias"],
        "residual_ptr": residual,
        "out_ptr": out,
        "stride_residual_m": 0 if residual is None else residual.stride(0),
        "stride_residual_n": 0 if residual is None else residual.stride(1),
    }


def inline_ptx_by_default(device: torch.device) -> bool:
    """Inline PTX on NVIDIA; elsewhere, and in the interpreter, the same arithmetic in plain Triton."""
    return device.type == "cuda" and torch.version.hip is None
