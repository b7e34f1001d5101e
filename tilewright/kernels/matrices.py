"""From tensors to matrices, and a library's product of two of them: what implementations of linear layers share on any
device. Imports no Triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tilewright.kernels.dispatch.problem import Problem

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Of a weight that is widened no more than this exists at once.
SCRATCH_BYTES = 128 * 2**20
#: Rows come in multiples of this many: eight share a word of zero points, and a kernel that finishes a block of
#: columns must not reach into the next one.
ROWS = 512


def why_empty(problem: Problem) -> str | None:
    """Why what takes all other problems does not take this one, or None."""
    return "nothing to multiply" if 0 in (problem.m, problem.n, problem.k) else None


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., K] as [M, K], also where M or K is 0; a view wherever strides allow one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., K] as [M, K] with unit stride along K, copied only if its strides do not allow that."""
    rows = as_matrix(x)
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def row_blocks(n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(first, past the last) row of each block of a weight [n, k] in ``dtype``."""
    fitting = SCRATCH_BYTES // (max(k, 1) * dtype.itemsize)
    step = max(ROWS, fitting // ROWS * ROWS)
    for first in range(0, n, step):
        yield first, min(first + step, n)


def wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the transpose of ``weight`` [N, K] of the same dtype, as float32 sums (float64 for float64)."""
    if x.dtype in (torch.float32, torch.float64):
        return x @ weight.t()
    if x.device.type == "cuda":
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()
