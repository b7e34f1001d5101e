"""Static int8 quantisation of activations, one scale for the whole tensor, in Triton.

    q = clamp(round_half_even(x / s) + z, -127, 127), or that + 128 as uint8; NaN becomes z

x fp16, bf16 or fp32 of any shape and strides; q contiguous, channels-last if there are four dimensions. Agrees with the
reference to the bit: the division is an IEEE division. An image that comes as NCHW is turned on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.conv_geometry import empty_channels_last
from tilewright.kernels.int8_conv2d.reference import marks_of
from tilewright.kernels.triton.common import why_not_float_rows
from tilewright.kernels.triton.rounding import requantize, store_quantized

#: Values of one program, 16 for each thread.
BLOCK = 2048
WARPS = 4
why_not = why_not_float_rows


@triton.jit(do_not_specialize=["H", "W"])
def quantize_per_tensor_kernel(
    x_ptr,
    q_ptr,
    scale,
    zero,
    count,
    H,
    W,
    C,
    stride_n,
    stride_h,
    stride_w,
    stride_c,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK of the ``count`` values of q, in the order of q's memory: NHWC, of which x has these strides unless
    DENSE.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if DENSE:
        offset = i
    else:
        row = i // C
        line = row // W
        offset = i % C * stride_c + row % W * stride_w + line % H * stride_h + line // H * stride_n
    v = tl.load(x_ptr + offset, mask=i < count, other=0.0).to(tl.float32)
    store_quantized(q_ptr + i, requantize(v, scale, zero), i < count)


def plan_quantize_per_tensor(x: torch.Tensor, scale: float, q: torch.Tensor, zero_point: int = 0) -> list[Launch]:
    """The launch that fills ``q``, which has the shape of ``x`` and the layout above."""
    if x.dim() == 4:
        nhwc = x.permute(0, 2, 3, 1)
    else:
        nhwc = x.reshape(1, 1, 1, -1)
    args = {
        "x_ptr": x if x.dim() == 4 else nhwc,
        "q_ptr": q,
        "scale": float(scale),
        "zero": float(zero_point),
        "count": x.numel(),
        **dict(zip(("H", "W", "C"), nhwc.shape[1:], strict=True)),
        **dict(zip(("stride_n", "stride_h", "stride_w", "stride_c"), nhwc.stride(), strict=True)),
    }
    constants = {"DENSE": nhwc.is_contiguous(), "BLOCK": BLOCK}
    grid = (triton.cdiv(x.numel(), BLOCK),)
    return [Launch(quantize_per_tensor_kernel, grid, args, constants, num_warps=WARPS)]


def quantize_per_tensor(
    x: torch.Tensor, scale: float, out_dtype: torch.dtype | None = None, zero_point: int = 0
) -> torch.Tensor:
    """See ``reference.quantize_per_tensor``."""
    dtype = out_dtype or torch.int8
    if x.dim() == 4:
        q = empty_channels_last(x.shape, dtype, x.device)
    else:
        q = torch.empty(x.shape, dtype=dtype, device=x.device)
    if q.numel():
        for launch in plan_quantize_per_tensor(x, scale, q, zero_point):
            launch.run()
    return q


def quantize_per_tensor_marked(
    x: torch.Tensor, scale: float, sample_dims: int, out_dtype: torch.dtype | None = None, zero_point: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_per_tensor_marked``; the marks are a reduction of PyTorch's."""
    return quantize_per_tensor(x, scale, out_dtype, zero_point), marks_of(x, sample_dims)
