"""One int8 scale for each row, on the device, and how a kernel that quantises whole rows cuts them up.

    s[m] = max_k |v[m, k]| / 127,   q[m, k] = clamp(round_half_even(v[m, k] / s[m]), -127, 127)

Both divisions are IEEE divisions, and the maximum is taken over the bits of |v| as integers, which order like the
numbers they stand for with NaN above infinity: a float maximum would drop the NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.matrices import as_matrix
from tilewright.kernels.triton.rounding import nearest_byte, quotient

#: Modules that the speed of a kernel that quantises rows depends on.
SHARED_SOURCES = tuple(f"tilewright.kernels.triton.{name}" for name in ("row_quantize", "rounding"))
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
ROW_CONFIGS = [
    QuantizeConfig.for_problem(Problem("quantize_per_row", m=1, n=0, k=k, x_dtype=torch.float16))
    for k in (64, 512, 2048, 4096, 16384, MAX_BLOCK_K + 1)
]


def candidates(problem: Problem) -> Iterator[QuantizeConfig]:
    """More or fewer rows and warps than the heuristic's."""
    one = QuantizeConfig.for_problem(problem)
    for rows, num_warps in itertools.product((1, 2, 4, 8, 16), (2, 4, 8, 16)):
        if 4 <= rows * one.block_k // (32 * num_warps) <= 64:
            yield replace(one, rows=rows, num_warps=num_warps)


def rows_problem(op: str, x: torch.Tensor) -> Problem:
    """The problem that the rows of ``x`` [M, K] pose."""
    return Problem(op, m=x.shape[0], n=0, k=x.shape[1], x_dtype=x.dtype, **device_facts(x.device))


def plan_rows(
    kernel: Any, config: QuantizeConfig, x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, **others: Any
) -> list[Launch]:
    """The launch of ``kernel`` that fills ``q`` and ``scale`` from ``x`` [M, K]. others: what else the kernel takes,
    constants in capitals.
    """
    args = {"x_ptr": x, "q_ptr": q, "scale_ptr": scale, "M": x.shape[0], "K": x.shape[1]}
    args |= {"stride_xm": x.stride(0), "stride_xk": x.stride(1)}
    args |= {name: value for name, value in others.items() if not name.isupper()}
    constants = {name: value for name, value in others.items() if name.isupper()}
    constants |= {"ROWS": config.rows, "BLOCK_K": config.block_k, "ONE_BLOCK": config.one_block}
    return [Launch(kernel, (triton.cdiv(len(x), config.rows),), args, constants, num_warps=config.num_warps)]


def run_rows(x: torch.Tensor, plan: Callable[..., list[Launch]], **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [..., K], float32 scale [...]) of ``x`` [..., K], filled by what ``plan`` launches. others: its further
    arguments; vectors are made contiguous.
    """
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if not q.numel():
        return q, torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    others = {name: value.contiguous() if isinstance(value, torch.Tensor) else value for name, value in others.items()}
    for launch in plan(as_matrix(x), q=q, scale=scale, **others):
        launch.run()
    return q, scale


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
