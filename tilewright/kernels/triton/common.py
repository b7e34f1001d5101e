"""What the Triton kernels share: activations, the epilogue, the order of tiles, and what all of them decline.

Everything on the device is float32 arithmetic. The activations pass NaN on and make none of a finite argument; -inf
becomes NaN under gelu and silu, as it does in PyTorch. ``activate`` is the device's side of
``activation.apply_activation``, ``finish_tile`` of ``epilogue.finish``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tilewright.kernels.dispatch.problem import Problem

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Whether a multiply-add is rounded once: in Triton's interpreter it is rounded twice.
_FUSED = tl.constexpr(not triton.knobs.runtime.interpret)


def why_not_on_gpu(problem: Problem) -> str | None:
    """Why no Triton kernel of ours runs on the problem's device, or None."""
    if problem.device != "cuda":
        return f"runs on a GPU, the tensors are on {problem.device!r}"
    if problem.capability is not None and problem.capability < (8, 0):
        major, minor = problem.capability
        return f"needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., K] as [M, K], also where M or K is 0; a view wherever strides allow one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, negative_slope=0.01):
    """``x`` float32 of any shape through the activation named ``ACTIVATION`` (of ``activation.CONV_ACTIVATIONS``)."""
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
def quotient(y, divisor):
    """float32 y / divisor, rounded once, for divisors in (0, 2^121) that serve many y: without a division for each.

    The reciprocal of the divisor gives a first quotient, and the exact remainder of each improves it, twice (Markstein,
    "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). NaN where y or divisor is not
    finite.
    """
    if _FUSED:
        # Powers of two change no digit, and keep the reciprocal of a tiny divisor finite.
        up = tl.where(divisor < 2.0**-100, 2.0**100, 1.0)
        y, divisor = y * up, divisor * up
        inverse = tl.math.div_rn(1.0, divisor)
        q = y * inverse
        q = tl.fma(tl.fma(-q, divisor, y), inverse, q)
        return tl.fma(tl.fma(-q, divisor, y), inverse, q)
    else:
        return tl.math.div_rn(y, divisor + tl.zeros_like(y))


@triton.jit
def nearest_byte(y):
    """int32 whose lowest byte is float32 ``y`` rounded to the nearest integer, half to even, for |y| < 2^21.

    Adding 1.5 * 2^23 leaves no bits for a fraction: the addition itself rounds, and the integer is what its last bits
    hold.
    """
    return (y + 12582912.0).to(tl.int32, bitcast=True)
