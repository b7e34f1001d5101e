"""Linear layer on int4 weights and int8 activations, W4A8 (the definition).

    y[m, n] = activation(s_x[m] * sum_g s[n, g] * P[m, n, g] + b[n]) + r[m, n]
    P[m, n, g] = sum over k in group g of q[m, k] * (u[n, k] - z[n, g])

with (q, s_x) = quantize_per_row(x). Every P is an exact int32; the rest is float32 and is cast once, to the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewright.kernels.epilogue import finish
from tilewright.kernels.formats import int4
from tilewright.kernels.quantize.reference import quantize_per_row


def int4_int8_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
    channel_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x float [..., K], weight_packed int32 [N, ceil(K / 8)], weight_scale [N, G], weight_zero int32 [ceil(N / 8),
    G].
    """
    k, n, groups = x.shape[-1], *weight_scale.shape
    q, x_scale = quantize_per_row(x, channel_scale)
    centred = int4.unpack_centred(weight_packed, weight_zero, group_size, k)
    pad = groups * group_size - k
    q_groups = F.pad(q.reshape(x_scale.numel(), k), (0, pad)).reshape(x_scale.numel(), groups, group_size)
    w_groups = F.pad(centred, (0, pad)).reshape(n, groups, group_size)
    partial = torch.einsum("mgk,ngk->mng", q_groups.double(), w_groups.double()).float()
    y = (partial * weight_scale.float()).sum(-1).reshape(*x.shape[:-1], n) * x_scale.unsqueeze(-1)
    return finish(y, bias, residual, activation, x.dtype)
