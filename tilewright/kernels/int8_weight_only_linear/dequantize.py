"""W8A16 linear layer for large batches, on any device: the weight is dequantised once and a library multiplies.

    y[m, n] = activation(s_w[n] * sum_k x[m, k] * w[n, k] + b[n]) + r[m, n]

Costs a temporary weight of N x K in the compute dtype, written and read once: little beside the product from some
hundred rows on. The epilogue is float32. On CUDA the product of half-precision operands comes out as float32, so the
int8 numbers multiply as they are and the scale follows the sum. Elsewhere the product is rounded to the compute dtype,
in which unscaled sums could overflow, so the weight is scaled first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import finish
from tilewright.kernels.matrices import FLOAT_DTYPES, as_matrix


def why_not(problem: Problem) -> str | None:
    """The reason why this implementation does not take ``problem``, or None."""
    if problem.x_dtype not in FLOAT_DTYPES or problem.multiply_dtype not in FLOAT_DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.x_dtype} computed in {problem.multiply_dtype}"
    return None


def int8_weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x float [..., K], weight int8 [N, K], weight_scale [N], bias [N], residual [..., N] -> x.dtype [..., N]."""
    narrow = compute_dtype or x.dtype
    if narrow == torch.float32:
        y = F.linear(x.float(), weight.float()) * weight_scale.float()
    elif x.device.type == "cuda":
        product = torch.mm(as_matrix(x).to(narrow), weight.to(narrow).t(), out_dtype=torch.float32)
        y = (product * weight_scale.float()).reshape(*x.shape[:-1], weight.shape[0])
    else:
        y = F.linear(x.to(narrow), (weight * weight_scale.float().unsqueeze(-1)).to(narrow)).float()
    return finish(y, bias, residual, activation, x.dtype)
