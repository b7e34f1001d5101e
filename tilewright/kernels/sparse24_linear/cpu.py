"""Linear layers on 2:4 weights that are unpacked once and multiplied by oneDNN's prepacked bfloat16 product, on a CPU.

No CPU multiplies 2:4 operands, and from a few rows on the multiplications take longer than reading the dense weight
does. The dense weight is made at the first call, in the library's order, and lives as long as the 2:4 one
(``dispatch.packed``). int4 values are dequantised into it: from some rows on that is faster than reading nibbles again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tilewright.kernels.cpu.probes import _Case, _probe
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import finish_rows
from tilewright.kernels.formats.sparse24 import Sparse24
from tilewright.kernels.formats.weight import Draw

#: Rows up to which a product that reads int4 is no slower than one in bfloat16 (384 x 384 to 4096 x 4096, two threads).
SMALL_INT4_BATCH = 16
#: The same where x is float32, which bfloat16 products have to round first.
SMALL_INT4_FLOAT32_BATCH = 32
#: Products up to which multiplying float32 takes less time than rounding x first and widening the result afterwards.
FEW_PRODUCTS = 1 << 18


def why_not(problem: Problem) -> str | None:
    """Why this product does not take the problem, or does not pay, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if problem.multiply_dtype != torch.bfloat16:
        return f"multiplies in bfloat16, not in {problem.multiply_dtype}"
    few = SMALL_INT4_FLOAT32_BATCH if problem.x_dtype == torch.float32 else SMALL_INT4_BATCH
    if problem.op == "sparse24_int4_linear" and problem.m <= few:
        return f"up to {few} rows int4 is read faster than bfloat16"
    if (
        problem.op == "sparse24_linear"
        and problem.x_dtype == torch.float32
        and problem.m * problem.n * problem.k <= FEW_PRODUCTS
    ):
        return f"up to {FEW_PRODUCTS} products float32 is multiplied faster than it is rounded"
    return why_no_prepacked()


@functools.cache
def why_no_prepacked() -> str | None:
    """Why oneDNN's prepacked bfloat16 product, a private operator of PyTorch, cannot be used, or None."""

    def check(draw: Draw) -> _Case:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise NotImplementedError("this CPU has no instructions for bfloat16")
        x, w = (draw.normal(n, 33, dtype=torch.bfloat16) for n in (5, 7))
        run = functools.partial(_multiply, x, _reorder(w))
        return run(), x.double() @ w.double().t(), run

    return _probe("oneDNN's prepacked product", check, 4e-3)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x bfloat16 [..., K] -> bfloat16 [..., N], rounded once."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] in bfloat16 and oneDNN's order: a tensor of its own, which keeps nothing of ``weight``."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16), None)


def prepare(
    bias: torch.Tensor | None, activation: str, compute_dtype: torch.dtype | None, k: int, **weight: Any
) -> Callable[..., torch.Tensor]:
    """``sparse24_linear`` or ``sparse24_int4_linear`` of ``k`` columns as a function of x and the residual, for as long
    as nobody writes into the tensors given here.
    """
    dense = packed(
        weight["weight_values"],
        f"2:4 dequantised for oneDNN, {k} columns in groups of {weight.get('group_size')}",
        lambda: _reorder(Sparse24.of_arguments(weight, k).dequantize(weight, k, torch.bfloat16)),
        *(weight.get(name) for name in Sparse24.NAMES[1:]),
    )
    once = activation == "none" and (bias is None or bias.dtype == torch.bfloat16)
    bias = None if bias is None else bias.contiguous()  # oneDNN looks at no strides

    def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            y = _multiply(x.to(torch.bfloat16), dense)
        elif once and residual is None:
            return _multiply(x, dense, bias)  # adds the bias and rounds once
        else:
            y = _multiply(x, dense)
        y = y.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return finish_rows(y, None, x.dtype, bias, residual, activation)

    return call
