"""Linear layers on 2:4 weights by the vendor's sparse product, cuSPARSELt through PyTorch: for large batches.

PyTorch's ``torch._cslt_compress`` and ``torch._cslt_sparse_mm`` are private: they are tried once on a small case before
they are used. The library compresses the unpacked weight itself; what it makes is kept (``dispatch.packed``). It wants
rows of x in multiples of 8 (int8: 16), so a few rows of zeros may follow the last.

    y[m, n] = activation(sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from typing_extensions import Unpack

from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import End, finish
from tilewright.kernels.formats import sparse24
from tilewright.kernels.matrices import FLOAT_DTYPES, as_matrix
from tilewright.kernels.quantize.triton_quantize import quantize_per_row
from tilewright.kernels.sparse24_linear import gate
from tilewright.kernels.triton.common import MAX_K

#: Multiples that the library wants of N and K, and of M.
_WEIGHT_MULTIPLE = {torch.float16: 16, torch.bfloat16: 16, torch.int8: 32}
_ROW_MULTIPLE = {torch.float16: 8, torch.bfloat16: 8, torch.int8: 16}


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None: it cannot, or it does not pay."""
    return _why_not_its_sizes(problem) or gate.why_not_library(problem) or why_no_cusparselt()


def why_cannot(problem: Problem) -> str | None:
    """The reason why the library cannot compute ``problem``, or None."""
    return _why_not_its_sizes(problem) or why_no_cusparselt()


def _why_not_its_sizes(problem: Problem) -> str | None:
    dtype = torch.int8 if problem.op == "sparse24_int8_linear" else problem.multiply_dtype
    if problem.x_dtype not in FLOAT_DTYPES or dtype not in _WEIGHT_MULTIPLE:
        return f"multiplies float16, bfloat16 and int8, not {problem.x_dtype} in {dtype}"
    multiple = _WEIGHT_MULTIPLE[dtype]
    if problem.n % multiple or problem.k % multiple:
        return f"takes weights in multiples of {multiple}, not {problem.n} x {problem.k}"
    if dtype == torch.int8 and problem.k > MAX_K:
        return f"sums of {problem.k} products may leave int32, which holds {MAX_K}"
    return None


@functools.cache
def why_no_cusparselt() -> str | None:
    """Why cuSPARSELt cannot be used, or None. The first call multiplies a small matrix, if there is a GPU."""
    try:
        if not torch.backends.cusparselt.is_available():
            return "this PyTorch, or this GPU, has no cuSPARSELt"
        with torch.inference_mode(False), torch.no_grad():
            for dtype in (torch.bfloat16, torch.int8):
                generator = torch.Generator("cuda").manual_seed(0)
                x, weight = (
                    torch.randint(-9, 10, shape, generator=generator, device="cuda").to(dtype)
                    for shape in ((48, 128), (64, 128))
                )
                weight *= sparse24.best_mask(weight.abs())
                found = multiply(x, torch._cslt_compress(weight), torch.int32 if dtype == torch.int8 else dtype)
                expected = x.double() @ weight.double().t()
                if not (found.double() - expected).norm() <= 4e-3 * expected.norm():
                    return f"cuSPARSELt gives wrong results in {dtype}"
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"cuSPARSELt is not usable in torch {torch.__version__}: {str(error).splitlines()[0]}"
    return None


def multiply(x: torch.Tensor, compressed: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] times the transpose of a weight that ``torch._cslt_compress`` made -> out_dtype [M, N]."""
    rows = F.pad(x, (0, 0, 0, -len(x) % _ROW_MULTIPLE[x.dtype])).contiguous()
    return torch._cslt_sparse_mm(compressed, rows.t(), out_dtype=out_dtype, transpose_result=True)[: len(x)]


def _compressed(weight_values: torch.Tensor, weight_meta: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    return packed(
        weight_values,
        f"2:4 for cuSPARSELt, {k} columns, {dtype}",
        lambda: torch._cslt_compress(sparse24.unpack(weight_values, weight_meta, k).to(dtype)),
        weight_meta,
    )


def sparse24_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    compute_dtype: torch.dtype | None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.sparse24_linear``; sums are rounded to ``compute_dtype`` before the epilogue."""
    narrow = compute_dtype or x.dtype
    weight = _compressed(weight_values, weight_meta, x.shape[-1], narrow)
    y = multiply(as_matrix(x).to(narrow), weight, narrow).view(*x.shape[:-1], len(weight_values))
    # NaN and Inf meet only the weights that are kept; the whole row must show them.
    return finish(y + 0 * x.sum(-1, keepdim=True, dtype=torch.float32), out_dtype=x.dtype, **end)


def sparse24_int8_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    channel_scale: torch.Tensor | None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See ``reference.sparse24_int8_linear``."""
    q, x_scale = quantize_per_row(x, channel_scale)
    weight = _compressed(weight_values, weight_meta, x.shape[-1], torch.int8)
    total = multiply(as_matrix(q), weight, torch.int32).view(*x.shape[:-1], len(weight_values))
    return finish(total.float() * x_scale.unsqueeze(-1) * weight_scale, out_dtype=x.dtype, **end)
