"""From recorded operators to steps of the C kernels: a function for each operator, or NotNative where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilewright.kernels.activation import TABLE
from tilewright.kernels.conv_geometry import check_sizes
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.lowering import Lowering, NotNative
from tilewright.kernels.cpu.replay_elementwise import ELEMENTWISE
from tilewright.kernels.cpu.replay_rows import ROWS
from tilewright.kernels.cpu.steps import Description, describe, set_residual, set_window


def _conv(operator: str) -> Callable[..., list[Description]]:
    """Of ``conv2d_fused`` or ``int8_conv2d_fused``."""

    def lower(plan: Lowering, *args: Any, result: torch.Tensor, **kwargs: Any) -> list[Description]:
        declared = getattr(torch.ops.tilewright, operator).default._schema.arguments
        given = {**dict(zip([argument.name for argument in declared], args, strict=False)), **kwargs}
        x, weight, residual = given.pop("x"), given.pop("weight"), given.pop("residual", None)
        scale, zero = given.pop("residual_scale", 1.0), given.pop("residual_zero_point", 0)
        for name in ("allow_tf32", "out_dtype"):
            given.pop(name, None)
        convolution = conv_steps.convolution(weight, **given)
        geometry = check_sizes("replay", x.shape, weight.shape, *convolution.window)
        if x.dtype not in conv_steps.TYPES or conv_steps.why_not_conv(geometry, x.dtype, convolution.activation):
            raise NotNative
        convolution = convolution._replace(x_nonnegative=convolution.x_nonnegative or plan.is_nonnegative(x))
        made: list[Description] = []
        source, target = plan.input(x, made), plan.image(result)
        packed = conv_steps.packed_weight(weight, geometry.groups, x.shape, convolution.window)
        description = conv_steps.describe_conv(source, target, packed, convolution)
        # Not the weight itself: that it is gone shows that the module has another.
        plan.kept.append((description.kept, weight.detach()))
        if residual is not None:
            set_residual(description, plan.image(residual), scale, zero)
        if result.dtype == torch.int8 and not convolution.out_zero_point and TABLE[convolution.activation].nonnegative:
            plan.set_nonnegative(result)
        return [*made, description]

    return lower


def _quantize(
    plan: Lowering,
    x: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype | None = None,
    zero_point: int = 0,
    *,
    result: torch.Tensor,
    marks: torch.Tensor | None = None,
) -> list[Description]:
    source, target = plan.live(x), plan.image(result)
    if source.dim() == 2:
        source = source[:, :, None, None]
    if source.dtype != torch.float32 or source.dim() != 4:
        raise NotNative
    return [conv_steps.describe_convert(source, target, scale, zero_point, marks)]


def _quantize_marked(
    plan: Lowering,
    x: torch.Tensor,
    scale: float,
    sample_dims: int,
    out_dtype: torch.dtype | None = None,
    zero_point: int = 0,
    *,
    result: Any,
) -> list[Description]:
    marks = plan.live(result[1])
    if plan.absorbed is not None:
        return _quantized_product(plan, plan.absorbed, scale, zero_point, result[0], marks)
    return _quantize(plan, x, scale, out_dtype, zero_point, result=result[0], marks=marks)


def _quantized_product(
    plan: Lowering, product: Any, scale: float, zero_point: int, result: torch.Tensor, marks: torch.Tensor
) -> list[Description]:
    """The product of images and a factor for each channel, which nothing else reads, at once in int8."""
    if plan.is_read_later(product.result) or marks.numel() != len(result):
        raise NotNative
    image, factors = _image_and_factors(*product.args)
    image, factors, target = plan.image(image), plan.image(factors), plan.image(result)
    made = _combine_images(plan, conv_steps.MULTIPLY, image, factors, target, (1, 1, scale), (0, 0, zero_point))
    made[0].marks, made[0].marks_count = marks.data_ptr(), marks.numel()
    return made


def _mark(plan: Lowering, y: torch.Tensor, marks: torch.Tensor, *, result: torch.Tensor) -> list[Description]:
    target, given = plan.image(y), plan.live(marks)
    if target.dtype != torch.float32 or given.dtype != torch.float32 or given.numel() not in (1, len(target)):
        raise NotNative
    return [conv_steps.describe_mark(target, given)]


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


def _max_pool(
    plan: Lowering,
    x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    result: Any,
) -> list[Description]:
    output = result[0] if isinstance(result, (tuple, list)) else result
    if output is not result and plan.is_read_later(result[1]):
        raise NotNative
    d = describe(conv_steps.MAX_POOL, plan.image(x), plan.image(output))
    top, left = _pair(padding)
    set_window(d, _pair(kernel_size), _pair(stride or kernel_size), (top, top, left, left), _pair(dilation))
    if plan.is_nonnegative(x):
        plan.set_nonnegative(output)
    return [d]


def _mean_of_images(
    plan: Lowering, x: torch.Tensor, scale: float, result: torch.Tensor, zero_point: int = 0
) -> list[Description]:
    source, target = plan.image(x), plan.live(result)
    if target.dtype != torch.float32 or not target.is_contiguous() or target.numel() != x.shape[0] * x.shape[1]:
        raise NotNative
    d = describe(conv_steps.MEAN, source, target.view(x.shape[0], x.shape[1], 1, 1))
    d.x_scale, d.x_zero = scale, zero_point
    return [d]


def _mean(
    plan: Lowering, x: torch.Tensor, dim: Any, keepdim: bool = False, dtype: Any = None, *, result: torch.Tensor
) -> list[Description]:
    if x.dim() != 4 or x.dtype != torch.float32 or sorted(each % 4 for each in dim) != [2, 3]:
        raise NotNative
    return _mean_of_images(plan, x, 1.0, result)


def _pool_to_one(
    plan: Lowering, x: torch.Tensor, *rest: Any, result: torch.Tensor, **options: Any
) -> list[Description]:
    """Average pooling with one result for an image. That it is the mean of all pixels, the first replay shows."""
    if x.dim() != 4 or result.shape[2:] != (1, 1):
        raise NotNative
    return _mean_of_images(plan, x, 1.0, result)


def _quantized_mean(
    plan: Lowering,
    q: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    dim: Any,
    keepdim: bool = False,
    zero_point: int = 0,
    *,
    result: Any,
) -> list[Description]:
    dims = (dim,) if isinstance(dim, int) else dim
    if q.dim() != 4 or sorted(each % 4 for each in dims) != [2, 3] or dtype != torch.float32:
        raise NotNative
    return _mean_of_images(plan, q, scale, result, zero_point)


def _add(plan: Lowering, a: Any, b: Any, alpha: float = 1, *, result: torch.Tensor) -> list[Description]:
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or alpha != 1 or a.dtype != b.dtype or a.dim() != 4:
        raise NotNative
    return _combine(plan, conv_steps.ADD, a, b, result)


def _combine(
    plan: Lowering,
    kind: int,
    a: torch.Tensor,
    b: torch.Tensor,
    result: torch.Tensor,
    scales: Sequence[float] = (1, 1, 1),
    zero_points: Sequence[int] = (0, 0, 0),
) -> list[Description]:
    """scales, zero_points: of a, of b, of the result."""
    plan.forget([result])
    return _combine_images(plan, kind, plan.image(a), plan.image(b), plan.image(result), scales, zero_points)


def _combine_images(
    plan: Lowering,
    kind: int,
    a: torch.Tensor,
    b: torch.Tensor,
    result: torch.Tensor,
    scales: Sequence[float] = (1, 1, 1),
    zero_points: Sequence[int] = (0, 0, 0),
) -> list[Description]:
    d = describe(kind, a, result)
    set_residual(d, b, scales[1], zero_points[1])
    d.x_scale, d.y_scale = scales[0], scales[2]
    d.x_zero, d.y_zero = zero_points[0], zero_points[2]
    return [d]


def _quantized_add(
    plan: Lowering,
    a: Any,
    a_scale: float,
    b: Any,
    b_scale: float,
    out_scale: float,
    zero_points: Sequence[int] = (0, 0, 0),
    *,
    result: torch.Tensor,
) -> list[Description]:
    if a.shape != b.shape:
        raise NotNative
    return _combine(plan, conv_steps.ADD, a, b, result, (a_scale, b_scale, out_scale), zero_points)


def _multiply(plan: Lowering, a: Any, b: Any, *, result: torch.Tensor) -> list[Description]:
    return _combine(plan, conv_steps.MULTIPLY, *_image_and_factors(a, b), result)


def _image_and_factors(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a product the images [N, C, H, W] and what their channels are multiplied by, [N, C, 1, 1]."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != torch.float32:
        raise NotNative
    if a.dim() == 4 and b.dim() == 4 and a.shape[2:] == (1, 1) != b.shape[2:]:
        a, b = b, a
    if b.dtype != torch.float32 or b.shape != (*a.shape[:2], 1, 1) or a.dim() != 4:
        raise NotNative
    return a, b


def _dequantize(
    plan: Lowering,
    q: torch.Tensor,
    scale: float,
    dtype: torch.dtype = torch.float32,
    zero_point: int = 0,
    *,
    result: torch.Tensor,
) -> list[Description]:
    d = describe(conv_steps.ACTIVATE, plan.image(q), plan.image(result))
    d.x_scale, d.x_zero = scale, zero_point
    return [d]


def _activate(name: str, arguments: tuple[float, ...]) -> Callable[..., list[Description]]:
    def lower(plan: Lowering, x: torch.Tensor, *rest: Any, result: torch.Tensor) -> list[Description]:
        if x.dtype != torch.float32 or rest != arguments:
            raise NotNative
        d = describe(conv_steps.ACTIVATE, plan.image(x), plan.image(result))
        d.activation = conv_steps.ACTIVATIONS[name]
        return [d]

    return lower


def _addmm(
    plan: Lowering, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, result: torch.Tensor
) -> list[Description]:
    return _linear(plan, x, weight.t(), bias, result=result)


def _linear(
    plan: Lowering, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, result: torch.Tensor
) -> list[Description]:
    """A linear layer is a convolution of images of one pixel."""
    source, target = plan.image(x), plan.image(result)
    n, k = weight.shape
    if source.dtype != torch.float32 or not weight.is_contiguous() or weight.dtype != torch.float32:
        raise NotNative
    if bias is not None and bias.shape != (n,):
        raise NotNative
    weight = weight.view(n, 1, 1, k)
    convolution = conv_steps.convolution(weight, bias)
    description = conv_steps.describe_conv(source, target, conv_steps.packed_weight(weight, 1), convolution)
    plan.kept.append(description.kept)
    return [description]


def _either(
    lower: Callable[..., list[Description]], otherwise: Callable[..., list[Description]]
) -> Callable[..., list[Description]]:
    """The steps that the first function makes, or the second where that has none."""

    def lower_either(plan: Lowering, *args: Any, **kwargs: Any) -> list[Description]:
        try:
            return lower(plan, *args, **kwargs)
        except NotNative:
            return otherwise(plan, *args, **kwargs)

    return lower_either


#: By the name of a recorded call.
NATIVE: dict[str, Callable[..., list[Description]]] = {
    "tilewright.conv2d_fused.default": _conv("conv2d_fused"),
    "tilewright.int8_conv2d_fused.default": _conv("int8_conv2d_fused"),
    "tilewright.quantize_per_tensor.default": _quantize,
    "tilewright.quantize_per_tensor_marked.default": _quantize_marked,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.max_pool2d.default": _max_pool,
    "aten.mean.dim": _mean,
    "aten._adaptive_avg_pool2d.default": _pool_to_one,
    "aten.adaptive_avg_pool2d.default": _pool_to_one,
    "aten.avg_pool2d.default": _pool_to_one,
    **ELEMENTWISE,
    "aten.add.Tensor": _either(_add, ELEMENTWISE["aten.add.Tensor"]),
    "aten.mul.Tensor": _either(_multiply, ELEMENTWISE["aten.mul.Tensor"]),
    "aten.addmm.default": _addmm,
    "aten.linear.default": _linear,
    **{
        f"aten.{row.aten[0]}{in_place}.default": _activate(row.name, row.aten[1])
        for row in TABLE.values()
        if row.aten is not None
        for in_place in ("", "_")
    },
    # functions that ``replay.recorded`` marks as these steps
    "step max_pool": _max_pool,
    "step mean": _quantized_mean,
    "step add": _quantized_add,
    "step dequantize": _dequantize,
    "step mark": _mark,
    **ROWS,
}
#: Steps that write to their first argument.
IN_PLACE = ("step mark",)
