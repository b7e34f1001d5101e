"""Dynamic int8 quantisation of activations, one scale for each row, in Triton.

    s[m] = max_k |v[m, k]| / 127,   q[m, k] = clamp(round_half_even(v[m, k] / s[m]), -127, 127),   v = float32(x) * c

x [M, K] fp16, bf16 or fp32 of any strides; c optional [K]; q int8 [M, K] contiguous; s float32 [M]. Agrees with the
reference to the bit: both divisions are IEEE divisions, and the maximum is taken over the bits of |v| as integers,
which order like the numbers they stand for with NaN above infinity: a float maximum would drop the NaN.

A program takes whole rows. Up to 16,384 columns stay in registers and x is read once; longer rows are read twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.triton.common import FLOAT_DTYPES, as_matrix, nearest_byte, quotient, why_not_on_gpu
from tilewright.kernels.tuning import tunable

MAX_BLOCK_K = 16384


@dataclass(frozen=True)
class QuantizeConfig:
    """rows: rows of one program. block_k: columns held at once (a power of two). one_block: they are the whole row."""

    rows: int
    block_k: int
    one_block: bool
    num_warps: int

    @classmethod
    def for_problem(cls, problem: Problem) -> QuantizeConfig:
        """Depends on K alone: about 16 values for each thread, and short rows share a program to fill its warps."""
        if problem.k > MAX_BLOCK_K:
            return cls(rows=1, block_k=4096, one_block=False, num_warps=8)
        block_k = max(64, triton.next_power_of_2(problem.k))
        num_warps = min(max(block_k // 512, 4), 16)
        return cls(rows=max(1, 2048 // block_k), block_k=block_k, one_block=True, num_warps=num_warps)


#: One of each kind that the heuristic chooses: many rows, a few, one with 4, 8 and 16 warps, and the loop.
CONFIGS = [
    QuantizeConfig.for_problem(Problem("quantize_per_row", m=1, n=0, k=k, x_dtype=torch.float16))
    for k in (64, 512, 2048, 4096, 16384, MAX_BLOCK_K + 1)
]


def candidates(problem: Problem) -> Iterator[QuantizeConfig]:
    """More or fewer rows and warps than the heuristic's."""
    one = QuantizeConfig.for_problem(problem)
    for rows, num_warps in itertools.product((1, 2, 4, 8, 16), (2, 4, 8, 16)):
        if 4 <= rows * one.block_k // (32 * num_warps) <= 64:
            yield replace(one, rows=rows, num_warps=num_warps)


TUNED = tunable(__name__, QuantizeConfig.for_problem, candidates)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.x_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype}"
    return why_not_on_gpu(problem)


@triton.jit
def magnitude_bits(v):
    """|v| as an integer that orders like it, with NaN above infinity."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(top_bits):
    """Scale of a row from the largest of its ``magnitude_bits``: 1 for a zero row, NaN or infinite if a value is."""
    scale = tl.math.div_rn(top_bits.to(tl.float32, bitcast=True), 127.0)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def quantize_values(v, scale):
    """int8 of float32 ``v``; 0 where ``scale`` is not finite."""
    finite = magnitude_bits(scale) < 0x7F800000
    # A scale that is not normal was rounded so much that a quotient may exceed 127.
    steps = tl.minimum(tl.maximum(quotient(v, scale), -127.0), 127.0)
    return tl.where(finite, nearest_byte(steps), 0).to(tl.int8)


@triton.jit
def _load_values(x_rows, channel_scale_ptr, column, row_mask, K, stride_xk):
    mask = row_mask & (column < K)
    v = tl.load(x_rows + column.to(tl.int64) * stride_xk, mask=mask, other=0.0).to(tl.float32)
    if channel_scale_ptr is not None:
        v *= tl.load(channel_scale_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    return v


# One binary serves every batch: nothing is gained from knowing that M is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["M"])
def quantize_per_row_kernel(
    x_ptr,
    channel_scale_ptr,
    q_ptr,
    scale_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """q and scale of ROWS rows of x [M, K]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_K)[None, :]
    row_mask = row[:, None] < M
    wide_row = row[:, None].to(tl.int64)
    x_rows = x_ptr + wide_row * stride_xm
    q_rows = q_ptr + wide_row * K
    if ONE_BLOCK:
        v = _load_values(x_rows, channel_scale_ptr, column, row_mask, K, stride_xk)
        scale = scale_of(tl.max(magnitude_bits(v), axis=1))
        tl.store(q_rows + column, quantize_values(v, scale[:, None]), mask=row_mask & (column < K))
    else:
        top = tl.zeros((ROWS, BLOCK_K), tl.int32)
        for start in range(0, K, BLOCK_K):
            v = _load_values(x_rows, channel_scale_ptr, start + column, row_mask, K, stride_xk)
            top = tl.maximum(top, magnitude_bits(v))
        scale = scale_of(tl.max(top, axis=1))
        for start in range(0, K, BLOCK_K):
            v = _load_values(x_rows, channel_scale_ptr, start + column, row_mask, K, stride_xk)
            tl.store(q_rows + start + column, quantize_values(v, scale[:, None]), mask=row_mask & (start + column < K))
    tl.store(scale_ptr + row, scale, mask=row < M)


def plan_quantize_per_row(
    x: torch.Tensor,
    channel_scale: torch.Tensor | None,
    q: torch.Tensor,
    scale: torch.Tensor,
    config: QuantizeConfig | None = None,
) -> list[Launch]:
    """The launch that quantises ``x`` [M, K] into ``q`` and ``scale``; channel_scale [K] must be contiguous."""
    m, k = x.shape
    if config is None:
        facts = device_facts(x.device)
        config = TUNED.choose(Problem("quantize_per_row", m=m, n=0, k=k, x_dtype=x.dtype, **facts))
    args = {
        "x_ptr": x,
        "channel_scale_ptr": channel_scale,
        "q_ptr": q,
        "scale_ptr": scale,
        "M": m,
        "K": k,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
    }
    constants = {"ROWS": config.rows, "BLOCK_K": config.block_k, "ONE_BLOCK": config.one_block}
    grid = (triton.cdiv(m, config.rows),)
    return [Launch(quantize_per_row_kernel, grid, args, constants, num_warps=config.num_warps)]


def quantize_per_row(x: torch.Tensor, channel_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [..., K] fp16, bf16 or fp32 on a GPU, ``channel_scale`` [K] -> (int8 [..., K], float32 scale [...])."""
    rows = as_matrix(x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if not q.numel():
        return q, torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if channel_scale is not None:
        channel_scale = channel_scale.contiguous()
    for launch in plan_quantize_per_row(rows, channel_scale, q, scale):
        launch.run()
    return q, scale
