"""In which order PyTorch's layer norm and mean add, so that the C kernel's norms have their bits."""

from __future__ import annotations

import ctypes
import functools

import torch

from tilewright.kernels.cpu import native, steps
from tilewright.kernels.cpu.row_steps import NormStep, describe

#: Lanes of the vectors that PyTorch may have been built with.
LANES = (8, 16)
#: Widths at which every part of the sum shows: lanes alone, chunks of vectors, levels of chunks, and what is left over.
_WIDTHS = (16, 300, 1100)
_SQUARE_WIDTHS = (16, 300, 1100, 5000)
_ROWS = 8


@functools.cache
def lanes() -> int:
    """How many lanes PyTorch's layer norm adds in, as its results on some rows tell; 0 where it adds in an order that
    the C kernel does not know. Raises RuntimeError where there are no C kernels.
    """
    draw = torch.Generator().manual_seed(0)
    empty = [torch.empty(_ROWS, width, dtype=torch.float32, device="cpu") for width in _WIDTHS]
    samples = [x.uniform_(1, 4, generator=draw) for x in empty]
    for count in LANES:
        if all(torch.equal(normalized(x, 1e-5, count), _expected(x, 1e-5)) for x in samples):
            return count
    return 0


@functools.cache
def square_lanes() -> int:
    """As ``lanes``, of the mean of squares that models with a root mean square norm are written in."""
    draw = torch.Generator().manual_seed(0)
    empty = [torch.empty(_ROWS, width, dtype=torch.float32, device="cpu") for width in _SQUARE_WIDTHS]
    samples = [x.uniform_(-2, 2, generator=draw) for x in empty]
    for count in LANES:
        if all(torch.equal(normalized(x, 1e-5, count, kind=steps.RMS_NORM), _root_mean_square(x)) for x in samples):
            return count
    return 0


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _expected(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.native_layer_norm(x, x.shape[1:], None, None, epsilon)[0]


def normalized(
    x: torch.Tensor,
    epsilon: float,
    count: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    kind: int = steps.NORM,
) -> torch.Tensor:
    """Layer norm (kind RMS_NORM: root mean square norm) of the rows of ``x`` float32 [M, K], contiguous, by the C
    kernel, its sums in ``count`` lanes.
    """
    y = torch.empty_like(x)
    rows, columns = x.shape
    job = NormStep(
        x=x.data_ptr(),
        y=y.data_ptr(),
        weight=None if weight is None else weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=rows,
        columns=columns,
        x_stride=columns,
        epsilon=epsilon,
        lanes=count,
    )
    step = describe(kind, job)
    native.function("run_steps")(ctypes.addressof(step), 1, 1)
    return y
