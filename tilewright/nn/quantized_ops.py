"""What stands between int8 convolutions and works on their int8 tensors: a scale and a zero point for a whole one.

int8 holds neither NaN nor an infinity. Whoever quantises floats therefore keeps marks beside them, and whoever makes
floats again puts the marks on those: a sample that was not finite somewhere is NaN everywhere, and no other is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tilewright.kernels.cpu.recording import recorded
from tilewright.kernels.cpu.replay import is_special
from tilewright.kernels.dispatch.derivatives import is_differentiated, straight_through


def quantize(
    x: torch.Tensor, scale: float, image_dims: int = 2, zero_point: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float ``x`` -> int8, q = clamp(round(x / scale) + zero_point, -127, 127), and marks: float32 [N], NaN where a
    sample of ``x`` holds a value that is not finite, else 0; one mark without dimensions if ``x`` is no batch.

    image_dims: of an image, beside its channels.
    """
    sample_dims = 1 if x.dim() > image_dims + 1 else 0
    return torch.ops.tilewright.quantize_per_tensor_marked(x.detach(), scale, sample_dims, None, zero_point)


def marks_of(x: torch.Tensor, image_dims: int = 2) -> torch.Tensor:
    """The marks of float ``x`` as ``quantize`` makes them."""
    return quantize(x, 1.0, image_dims)[1]


def reshaped_marks(marks: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The marks of ``after``, which holds the values of ``before`` in the same order, whose marks are given."""
    if not marks.dim() or before.shape[0] == after.shape[0]:
        return marks
    return _along(marks, before).expand(before.shape).reshape(after.shape[0], -1).sum(1)


def mark(y: torch.Tensor, marks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Float ``y``, a tensor of the caller's own, with NaN written over what stands under a NaN of ``marks``."""
    for each in marks:
        if not _is_seen_clean(each):
            y = _mark(y, each)
    return y


def _is_seen_clean(marks: torch.Tensor) -> bool:
    """Whether no sample is marked, and a call on a CPU may look, which is quicker than to add zeros."""
    if torch.compiler.is_compiling() or type(marks) is not torch.Tensor or not marks.is_cpu or is_special():
        return False
    return not bool(marks if marks.numel() == 1 else marks.any())


@recorded("mark")
def _mark(y: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    return y.add_(_along(marks, y))


def _along(marks: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``marks`` with the dimensions of ``y``."""
    return marks.reshape(marks.shape + (1,) * (y.dim() - marks.dim()))


@recorded("dequantize")
def dequantize(q: torch.Tensor, scale: float, dtype: torch.dtype = torch.float32, zero_point: int = 0) -> torch.Tensor:
    """(q - zero_point) * scale of int8 ``q`` of any shape, taken in float32 -> ``dtype``."""
    return ((q.to(torch.float32) - zero_point) * scale).to(dtype)


def rounded(x: torch.Tensor, scale: float, image_dims: int = 2, zero_point: int = 0) -> torch.Tensor:
    """Float ``x`` of any shape as ``quantize`` and ``dequantize`` leave it, with its marks; derivatives pass."""
    if is_differentiated(x):
        return straight_through(lambda x: _rounded(x, scale, image_dims, zero_point), lambda x: x, x)
    return _rounded(x, scale, image_dims, zero_point)


def _rounded(x: torch.Tensor, scale: float, image_dims: int, zero_point: int) -> torch.Tensor:
    q, marks = quantize(x, scale, image_dims, zero_point)
    return mark(dequantize(q, scale, x.dtype, zero_point), (marks,))


@recorded("mean")
def mean(
    q: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    dim: int | tuple[int, ...],
    keepdim: bool = False,
    zero_point: int = 0,
) -> torch.Tensor:
    """The mean over ``dim`` of what int8 ``q`` stands for: summed in float32, which is exact up to 2^17 values."""
    return ((q.mean(dim, keepdim=keepdim, dtype=torch.float32) - zero_point) * scale).to(dtype)


@recorded("add")
def add(
    a: torch.Tensor,
    a_scale: float,
    b: torch.Tensor,
    b_scale: float,
    out_scale: float,
    zero_points: Sequence[int] = (0, 0, 0),
) -> torch.Tensor:
    """a + b as int8 with ``out_scale``; each of a and b is float (its scale is not read) or int8. Shapes broadcast.

    zero_points: of a, b and the result.
    """
    wide = [
        dequantize(t, s, zero_point=z) if t.dtype == torch.int8 else t.to(torch.float32)
        for t, s, z in ((a, a_scale, zero_points[0]), (b, b_scale, zero_points[1]))
    ]
    return torch.ops.tilewright.quantize_per_tensor(wide[0] + wide[1], out_scale, None, zero_points[2])


def relu(q: torch.Tensor, zero_point: int, inplace: bool = False) -> torch.Tensor:
    """ReLU of what int8 ``q`` stands for, with the same scale."""
    return q.clamp_min_(zero_point) if inplace else q.clamp_min(zero_point)


def pad(q: torch.Tensor, padding: Sequence[int], zero_point: int) -> torch.Tensor:
    """int8 ``q`` [..., H, W] or [..., W] with what stands for zeros around it. padding: top, bottom, left, right."""
    top, bottom, left, right = padding
    sides = (left, right, top, bottom) if top or bottom else (left, right)
    return torch.nn.functional.pad(q, sides, value=zero_point)


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
