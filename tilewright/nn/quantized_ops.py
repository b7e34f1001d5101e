"""What stands between int8 convolutions and works on their int8 tensors: symmetric, one scale for a whole tensor."""

from __future__ import annotations

import torch

from tilewright.kernels.cpu.replay import recorded


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Float ``x`` of any shape -> int8, q = clamp(round(x / scale), -127, 127)."""
    return torch.ops.tilewright.quantize_per_tensor(x, scale)


@recorded("dequantize")
def dequantize(q: torch.Tensor, scale: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """int8 ``q`` of any shape -> ``dtype``; the product is taken in float32."""
    return (q.to(torch.float32) * scale).to(dtype)


def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Float ``x`` of any shape as ``quantize`` and ``dequantize`` leave it."""
    return dequantize(quantize(x, scale), scale, x.dtype)


@recorded("mean")
def mean(
    q: torch.Tensor, scale: float, dtype: torch.dtype, dim: int | tuple[int, ...], keepdim: bool = False
) -> torch.Tensor:
    """The mean of int8 ``q`` over ``dim`` as a float tensor: summed in float32, which is exact up to 2^17 values."""
    return (q.mean(dim, keepdim=keepdim, dtype=torch.float32) * scale).to(dtype)


@recorded("add")
def add(a: torch.Tensor, a_scale: float, b: torch.Tensor, b_scale: float, out_scale: float) -> torch.Tensor:
    """a + b as int8 with ``out_scale``; each of a and b is float (its scale is not read) or int8. Shapes broadcast."""
    wide = [
        t.to(torch.float32) * s if t.dtype == torch.int8 else t.to(torch.float32)
        for t, s in ((a, a_scale), (b, b_scale))
    ]
    return torch.ops.tilewright.quantize_per_tensor(wide[0] + wide[1], out_scale)


def _pair(value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@recorded("max_pool")
def max_pool2d(
    q: torch.Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """``torch.max_pool2d`` of int8 ``q`` [N, C, H, W]; the result has the same scale.

    PyTorch's own keeps indices in the dtype of its input and so refuses int8 images of more than 127 values.
    """
    windows = zip(
        (2, 3), _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation), strict=True
    )
    for dim, kernel, step, pad, gap in windows:
        q = _max_along(q, dim, kernel, step, pad, gap, ceil_mode)
    return q


def _max_along(
    q: torch.Tensor, dim: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> torch.Tensor:
    size, reach = q.shape[dim], dilation * (kernel - 1) + 1
    steps = size + 2 * padding - reach
    count = (-(-steps // stride) if ceil_mode else steps // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # A window must start within the image or the padding before it.
    after = max((count - 1) * stride + reach - size - padding, 0)
    if padding or after:
        pads = (0, 0, padding, after) if dim == 2 else (padding, after)
        q = torch.nn.functional.pad(q, pads, value=-128)
    result = q
    for tap in range(kernel):
        window = [slice(None)] * 4
        window[dim] = slice(tap * dilation, tap * dilation + (count - 1) * stride + 1, stride)
        part = q[tuple(window)]
        result = part if tap == 0 else torch.maximum(result, part)
    return result
