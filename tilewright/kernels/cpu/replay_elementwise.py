"""From recorded operators on single numbers of float32 tensors to steps of elementwise.c: rotary embeddings, gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.lowering import Lowering, NotNative
from tilewright.kernels.cpu.row_steps import ElementwiseStep, describe
from tilewright.kernels.cpu.steps import Description

#: Of elementwise.c.
COPY, NEGATE, SUM, DIFFERENCE, PRODUCT = range(5)
#: Up to so many numbers one thread is done before a second has begun.
_ALONE = 4096
_DIMS = 4


def elementwise(operation: int) -> Callable[..., list[Description]]:
    """Of an operator of one tensor, or of two, of which the second may be a number."""

    def lower(plan: Lowering, a: Any, b: Any = None, *rest: Any, result: torch.Tensor, **options: Any) -> Any:
        if (
            rest
            or any(value != 1 for value in options.values())
            or (operation in (SUM, DIFFERENCE, PRODUCT)) != (b is not None)
        ):
            raise NotNative
        return [combined(plan, operation, a, b, plan.live(result))]

    return lower


def squared(plan: Lowering, x: torch.Tensor, power: float, *, result: torch.Tensor) -> list[Description]:
    """``pow``, which PyTorch computes as a product where the power is 2."""
    if power != 2:
        raise NotNative
    return [combined(plan, PRODUCT, x, x, plan.live(result))]


def copied(plan: Lowering, x: torch.Tensor, *, memory_format: Any = None, result: torch.Tensor) -> list[Description]:
    """``clone``."""
    return [combined(plan, COPY, x, None, plan.live(result))]


def concatenated(
    plan: Lowering, tensors: Sequence[torch.Tensor], dim: int = 0, *, result: torch.Tensor
) -> list[Description]:
    """``cat``: a copy for each part, none of which waits for another."""
    target, begin, made = plan.live(result), 0, []
    if any(each.dim() != target.dim() for each in tensors):
        raise NotNative  # nothing, of whatever shape, may be joined to anything
    for each in tensors:
        if each.shape[dim]:
            made.append(combined(plan, COPY, each, None, target.narrow(dim, begin, each.shape[dim])))
            made[-1].independent = len(made) > 1
            begin += each.shape[dim]
    return made


def combined(plan: Lowering, operation: int, a: Any, b: Any, y: torch.Tensor) -> Description:
    """The step that computes ``y``, where it is, of recorded ``a`` and ``b``, a tensor or a number or None."""
    if not isinstance(a, torch.Tensor) or not y.numel() or _is_image(y):
        raise NotNative
    sources = [plan.live(each) for each in (a, b) if isinstance(each, torch.Tensor)]
    if any(each.dtype != torch.float32 for each in (*sources, y)):
        raise NotNative
    sizes, strides = _collapsed([y, *[each.expand(y.shape) for each in sources]])
    if len(sizes) > _DIMS or strides[0][-1] != 1 or 0 in strides[0]:
        raise NotNative
    if y.numel() > _ALONE and any(each[-1] > 1 for each in strides):
        raise NotNative  # numbers are gathered one by one
    job = ElementwiseStep(a=sources[0].data_ptr(), y=y.data_ptr(), operation=operation, alone=y.numel() <= _ALONE)
    first = _DIMS - len(sizes)
    job.size[:] = [1] * first + sizes
    for name, found in zip(("y_stride", "a_stride", "b_stride"), strides, strict=False):
        getattr(job, name)[:] = [0] * first + found
    if len(sources) == 2:
        job.b = sources[1].data_ptr()
    elif b is not None:
        job.scalar = b
    return describe(steps.ELEMENTWISE, job)


def _is_image(y: torch.Tensor) -> bool:
    """Whether it is one of a convolution's, which have steps of their own."""
    pixels = y.dim() == 4 and y.shape[2] * y.shape[3] > 1 and y.shape[1] > 1
    return pixels and y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def _collapsed(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[list[int]]]:
    """Sizes and each tensor's strides, the first one's largest stride first, without dimensions of one and with those
    that are one in memory joined.
    """
    shape = tensors[0].shape
    dims = sorted((d for d in range(len(shape)) if shape[d] > 1), key=tensors[0].stride, reverse=True)
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for d in dims:
        given = [each.stride(d) for each in tensors]
        if sizes and all(s[-1] == stride * shape[d] for s, stride in zip(strides, given, strict=True)):
            sizes[-1] *= shape[d]
            for s, stride in zip(strides, given, strict=True):
                s[-1] = stride
        else:
            sizes.append(shape[d])
            for s, stride in zip(strides, given, strict=True):
                s.append(stride)
    return sizes or [1], [s or [1] for s in strides]


#: By the name of a recorded call.
ELEMENTWISE: dict[str, Callable[..., list[Description]]] = {
    "aten.add.Tensor": elementwise(SUM),
    "aten.sub.Tensor": elementwise(DIFFERENCE),
    "aten.mul.Tensor": elementwise(PRODUCT),
    "aten.neg.default": elementwise(NEGATE),
    "aten.pow.Tensor_Scalar": squared,
    "aten.clone.default": copied,
    "aten.cat.default": concatenated,
}
