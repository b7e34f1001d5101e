"""Linear layer on int4 weights (W4A16) for large batches on a GPU: a kernel dequantises, the library multiplies.

    w[n, k] = dtype((u[n, k] - z[n, g]) * s[n, g]),    g = k // group_size

``triton.int4_dequantize`` makes w [N, K] in the compute dtype, some rows at a time, from the canonical weight of
``formats.int4``, so any group size will do.

Without activation and residual the library's product adds the bias itself and rounds once, and nothing follows.
Otherwise it leaves float32 sums, and the kernel that adds the parts of a cut K (``triton.split_k``) finishes them in
one pass over the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.epilogue import End
from tilewright.kernels.matrices import FLOAT_DTYPES, as_matrix, wide_product
from tilewright.kernels.triton.common import why_not_on_gpu
from tilewright.kernels.triton.int4_dequantize import DequantizeConfig, dequantized_blocks
from tilewright.kernels.triton.linear import run_linear
from tilewright.kernels.triton.split_k import plan_sum_parts
from tilewright.kernels.tuning import tunable

CONFIGS = [DequantizeConfig(rows=4, words=128, num_warps=2)]
TUNED = tunable(
    __name__,
    DequantizeConfig.for_problem,
    lambda problem: (DequantizeConfig(rows, 512 // rows, warps) for rows in (2, 4, 8, 16) for warps in (2, 4, 8)),
    shares=("tilewright.kernels.triton.int4_dequantize",),
)


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.x_dtype not in FLOAT_DTYPES or problem.multiply_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype} multiplied in {problem.multiply_dtype}"
    return why_not_on_gpu(problem)


def int4_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    *,
    group_size: int,
    compute_dtype: torch.dtype | None = None,
    **end: Unpack[End],
) -> torch.Tensor:
    """See the reference."""
    n, k = len(weight_packed), x.shape[-1]
    narrow = compute_dtype or x.dtype

    def launches(out: torch.Tensor, **end: Unpack[End]) -> Iterator[Launch]:
        rows, bias = as_matrix(x).to(narrow), end["bias"]
        plain = end["activation"] == "none" and end["residual"] is None
        rounds_once = plain and narrow == x.dtype and (bias is None or bias.dtype == narrow)
        facts: dict[str, Any] = {"group_size": group_size, "symmetric": weight_zero is None}
        facts |= {"compute_dtype": compute_dtype, **device_facts(x.device)}
        config = TUNED.choose(Problem("int4_linear", len(rows), n, k, x.dtype, **facts))
        weight = (weight_packed, weight_scale, weight_zero, k, narrow, group_size, config)
        for first, block in dequantized_blocks(*weight):
            if not rounds_once:
                sums = wide_product(rows, block).unsqueeze(0)
                yield plan_sum_parts(sums, None, out, first, **end)
                continue
            columns = slice(first, first + len(block))
            if bias is None:
                torch.mm(rows, block.t(), out=out[:, columns])
            else:
                torch.addmm(bias[columns], rows, block.t(), out=out[:, columns])

    return run_linear(x, n, x.dtype, launches, **end)
