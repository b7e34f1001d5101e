"""Steps of a network for the C kernels: convolutions with packed weights, pooling, sums, products, changes of type.

A ``Description`` is the structure of program.h with the tensors it points to. One call executes any number of them,
without the interpreter in between.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tilewright.kernels.activation import TABLE
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.same import TensorCache, version_of

FLOAT32, INT8, UINT8, NONNEGATIVE = range(4)
CONV, DEPTHWISE, MAX_POOL, MEAN, ADD, MULTIPLY, CONVERT, ACTIVATE, WINOGRAD, MARK = range(10)
INT8_QUANTIZE, INT8_PRODUCT, ATTENTION, NORM, INT4_QUANTIZE, INT4_PRODUCT = range(10, 16)  # which row_steps describes
WEIGHT_ONLY_CONVERT, WEIGHT_ONLY_PRODUCT, RMS_NORM, ELEMENTWISE = range(16, 20)  # likewise
TYPES = {torch.float32: FLOAT32, torch.int8: INT8, torch.uint8: UINT8}
#: Those that the kernels have, by their numbers in C.
ACTIVATIONS = {row.name: row.number for row in TABLE.values() if "convolution" in row.native}
#: Limits of the kernels' tables; see conv_tile.h, conv_int8.c and conv.h.
MOST_WINDOWS, MOST_GATHERED_BYTES, MOST_PIXEL_BYTES, MOST_TAPS = 4096, 64 << 10, 1 << 16, 128
#: Windows over fewer channels are copied first: a loop over three channels costs more than the copy.
FEW_CHANNELS = 8
#: Sums of products of int8 values must stay below 2^31.
LARGEST_DEPTH = 66_000
#: int8 values in a row of a tile of weights; see conv_int8_amx.h.
TILE_DEPTH = 64


#: stride, padding (top, bottom, left, right), dilation, groups
Window = tuple[Sequence[int], Sequence[int], Sequence[int], int]


class Convolution(NamedTuple):
    """What the operators ask for, beside the images and the weight; see ``convolution``. kernel: height, width."""

    kernel: Sequence[int]
    window: Window
    activation: str
    negative_slope: float
    x_scale: float
    out_scale: float | None
    x_nonnegative: bool
    x_zero_point: int
    out_zero_point: int
    bias: torch.Tensor | None
    weight_scale: torch.Tensor | None


def convolution(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    negative_slope: float = 0.01,
    weight_scale: torch.Tensor | None = None,
    x_scale: float = 1.0,
    out_scale: float | None = None,
    x_nonnegative: bool = False,
    x_zero_point: int = 0,
    out_zero_point: int = 0,
) -> Convolution:
    """The arguments of ``conv2d_fused`` and ``int8_conv2d_fused`` with their defaults, fit for the key of a cache."""
    window = (tuple(stride), tuple(padding), tuple(dilation), groups)
    scales = (x_scale, out_scale, x_nonnegative, x_zero_point, out_zero_point)
    return Convolution(weight.shape[1:3], window, activation, negative_slope, *scales, bias, weight_scale)


class Description(ctypes.Structure):
    """``tw_step`` of program.h. kept: what it points to. described: what ``job`` points to (``row_steps``)."""

    kept: tuple[torch.Tensor, ...]
    described: ctypes.Structure | None = None
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                "kind",
                "x_type",
                "y_type",
                "r_type",
                "activation",
                "gather",
                "independent",
                "band",
                "chain",
                "in_slot",
            )
        ),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "out_channels")),
        *((name, ctypes.c_int64) for name in ("kernel_height", "kernel_width", "stride_height", "stride_width")),
        *((name, ctypes.c_int64) for name in ("top", "left", "dilation_height", "dilation_width", "groups")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride", "r_stride", "x_image", "x_row", "x_channel")),
        ("marks_count", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "weight",
                "residual",
                "y",
                "scale",
                "bias",
                "compensation",
                "signed_compensation",
                "outside",
                "plain",
                "marks",
            )
        ),
        *((name, ctypes.c_float) for name in ("slope", "x_scale", "r_scale", "y_scale")),
        *((name, ctypes.c_float) for name in ("x_zero", "r_zero", "y_zero")),
        ("job", ctypes.c_void_p),
        ("units", ctypes.c_int64 * 2),
        ("count", ctypes.c_void_p),
    ]


def lanes() -> int:
    """Numbers in a vector of the instruction set in use; 0 where it has no C kernels for convolution."""
    return native.function("conv_lanes")()


def why_no_kernels() -> str | None:
    """Why the C kernels cannot convolve, or None if they can."""
    return native.why_no_native() or (None if lanes() else f"there are no C kernels for convolution on {native.isa()}")


def why_not_conv(geometry: ConvGeometry | None, x_dtype: torch.dtype, activation: str = "none") -> str | None:
    """Why the C kernels do not take a convolution of that geometry, or None."""
    if geometry is None:
        return "no convolution"
    if activation not in ACTIVATIONS:
        return f"the C kernels have no {activation}"
    integer = x_dtype != torch.float32
    if reason := why_no_kernels():
        return reason
    if 0 in (geometry.batch, geometry.in_channels, geometry.out_channels):
        return "nothing to multiply"
    size = 1 if integer else 4
    depth = geometry.taps * geometry.group_channels
    if integer and depth > LARGEST_DEPTH:
        return f"int32 sums of products may overflow beyond {LARGEST_DEPTH} values in a window"
    if max(geometry.in_channels, geometry.out_channels) * size > MOST_PIXEL_BYTES:
        return f"a pixel has more than {MOST_PIXEL_BYTES} bytes"
    if geometry.depthwise and geometry.out_channels == geometry.in_channels:
        return f"a window of more than {MOST_TAPS} values" if geometry.taps > MOST_TAPS else None
    if gathers(geometry.group_channels, geometry.taps, integer):
        return "a window too large to copy" if (depth + 3) * size > MOST_GATHERED_BYTES else None
    return f"a window of more than {MOST_WINDOWS} values" if geometry.taps > MOST_WINDOWS else None


def gathers(group_channels: int, taps: int, integer: bool) -> bool:
    """Whether each window is copied to one row, because its channels are few or no multiple of four int8."""
    return (integer and group_channels % 4 != 0) or (group_channels < FEW_CHANNELS and taps > 1)


# ---- weights
@dataclass(frozen=True)
class PackedWeight:
    """weight: in the kernels' order. sums: int32, of each output channel's int8 weights. kind: CONV, DEPTHWISE or
    WINOGRAD. plain: address of the weight that it was made of, for WINOGRAD. descriptions: of calls that were made with
    it, by all that they depend on.
    """

    weight: torch.Tensor
    sums: torch.Tensor | None
    kind: int
    gather: bool
    plain: int | None = None
    descriptions: TensorCache[Description] = field(default_factory=lambda: TensorCache(64))


def padded_vector(values: torch.Tensor, groups: int) -> torch.Tensor:
    """[Co] -> the same for each group, followed by zeros up to whole vectors."""
    per_group = values.detach().reshape(groups, -1)
    return F.pad(per_group, (0, -per_group.shape[1] % lanes())).reshape(-1)


def pack_weight(weight: torch.Tensor, groups: int) -> PackedWeight:
    """OHWI weight, float32 or int8, in the order of conv_tile.h or, for depthwise convolutions, of their kernels."""
    weight = weight.detach()
    out_channels, height, width, channels = weight.shape
    integer, taps = weight.dtype == torch.int8, height * width
    total = weight.sum((1, 2, 3), dtype=torch.int32) if integer else None
    if groups > 1 and groups == out_channels and channels == 1:
        if integer and (height, width) == (3, 3):  # column by column, each with a fourth tap of zeros
            weight = F.pad(weight.transpose(1, 2), (0, 0, 0, 1))
        packed_taps = _pack_depthwise(weight.reshape(out_channels, -1))
        return PackedWeight(packed_taps, None if total is None else padded_vector(total, 1), DEPTHWISE, False)
    step = 4 if integer else 1
    depth, group_out = taps * channels, out_channels // groups
    rows = F.pad(weight.reshape(out_channels, depth), (0, -depth % step)).view(groups, group_out, -1)
    vectors = -(-group_out // lanes())
    blocks = []
    for group in F.pad(rows, (0, 0, 0, vectors * lanes() - group_out)):
        first = 0
        while first < vectors:
            wide = min(vectors - first, 3) if vectors - first in (1, 3) else 2  # block_vectors of conv_tile.h
            block = group[first * lanes() : (first + wide) * lanes()]
            # [channels, depth] -> [depth / step, channels, step]
            blocks.append(block.reshape(wide * lanes(), -1, step).transpose(0, 1).reshape(-1))
            first += wide
    # Tiles are read as a whole, those at the end of a window whose depth is no multiple of theirs too.
    blocks.append(rows.new_zeros(TILE_DEPTH // step * 3 * lanes() * step if integer else 0))
    sums = None if total is None else padded_vector(total, groups)
    return PackedWeight(torch.cat(blocks), sums, CONV, gathers(channels, taps, integer))


def _pack_depthwise(flat: torch.Tensor) -> torch.Tensor:
    """[C, taps] -> float32 [taps, whole vectors of C]; int8 as ``depthwise_pixel`` of conv_int8.c interleaves it."""
    channels, taps = flat.shape
    if flat.dtype != torch.int8:
        return F.pad(flat.t(), (0, -channels % lanes())).contiguous()
    padded = F.pad(flat, (0, -taps % 4, 0, -channels % (4 * lanes())))
    # Of 4 * lanes() channels, number 16 lane + 4 vector + i lies at [tap / 4, vector, lane, i, tap % 4].
    parts = padded.view(-1, lanes() // 4, 4, 4, padded.shape[1] // 4, 4)
    return parts.permute(0, 4, 2, 1, 3, 5).contiguous()


#: The factors that F(2 x 2, 3 x 3) multiplies a window's weights with; the other matrices are in conv_winograd.c.
_WINOGRAD = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def pack_winograd(weight: torch.Tensor) -> PackedWeight:
    """OHWI weight [Co, 3, 3, C], float32, as conv_winograd.c reads it: [panel][point][C][channels of the panel]."""
    factors = torch.tensor(_WINOGRAD, dtype=torch.float64)
    points = torch.einsum("ai,bj,oijc->abco", factors, factors, weight.detach().double()).float().flatten(0, 1)
    points = F.pad(points, (0, -points.shape[-1] % lanes()))
    panels = [panel.reshape(-1) for panel in points.split(2 * lanes(), -1)]
    return PackedWeight(torch.cat(panels), None, WINOGRAD, False, weight.data_ptr())


#: Fewer channels than that are transformed for longer than they are multiplied; for more a block would be too small.
WINOGRAD_CHANNELS = range(32, 1025)


def prefers_winograd(x_shape: Sequence[int], weight: torch.Tensor, window: Window) -> bool:
    """Whether tiles of 2 x 2 results are faster than windows of float32: 3 x 3, stride 1, few half-empty tiles."""
    stride, padding, dilation, groups = window
    out_channels, kernel_height, kernel_width, channels = weight.shape
    if (kernel_height, kernel_width, groups) != (3, 3, 1):
        return False
    if tuple(stride) != (1, 1) or tuple(dilation) != (1, 1) or not weight.is_contiguous():
        return False
    if channels not in WINOGRAD_CHANNELS or channels % 16 or out_channels < 16:
        return False
    height, width = x_shape[2] + padding[0] + padding[1] - 2, x_shape[3] + padding[2] + padding[3] - 2
    tiles = -(-height // 2) * -(-width // 2)
    # 16 products for a tile, 9 for a pixel
    return x_shape[0] * tiles >= FEWEST_TILES and 16 * 1.2 * tiles <= 9 * height * width


#: With fewer the weights, which are 16 / 9 as many, are read for too little.
FEWEST_TILES = 16


def packed_weight(
    weight: torch.Tensor, groups: int, x_shape: Sequence[int] = (), window: Window | None = None
) -> PackedWeight:
    """The weight in the order of the fastest kernel for a convolution of that window, made once for as long as
    ``weight`` lives unchanged.
    """
    if window and weight.dtype == torch.float32 and prefers_winograd(x_shape, weight, window):
        return packed(weight, f"c-winograd-{lanes()}", lambda: pack_winograd(weight))
    return packed(weight, f"c-conv-{groups}-{lanes()}", lambda: pack_weight(weight, groups))


# ---- steps
def pixel_stride(x: torch.Tensor) -> int:
    """Elements between neighbouring pixels of a channels-last tensor, perhaps a slice of another's channels."""
    n, c, h, w = x.shape
    return x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the C kernels can read ``x`` [N, C, H, W] where it is."""
    n, c, h, w = x.shape
    step = pixel_stride(x)
    required = ((n, h * w * step), (c, 1), (h, w * step), (w, step))
    return step >= c and all(size == 1 or s == want for s, (size, want) in zip(x.stride(), required, strict=True))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` if the C kernels can read it where it is, else a copy."""
    dense = x.is_contiguous(memory_format=torch.channels_last)  # asked first, because it is the quicker question
    return x if dense or is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)


def describe(kind: int, x: torch.Tensor, y: torch.Tensor) -> Description:
    """A description of ``kind`` from x [N, C, H, W] to y [N, Co, P, Q], both channels-last."""
    d = Description(kind=kind, x_type=TYPES[x.dtype], y_type=TYPES[y.dtype], x=x.data_ptr(), y=y.data_ptr())
    d.batch, d.channels, d.height, d.width = x.shape
    _, d.out_channels, d.out_height, d.out_width = y.shape
    d.x_stride, d.y_stride = pixel_stride(x), pixel_stride(y)
    d.groups = d.kernel_height = d.kernel_width = d.stride_height = d.stride_width = 1
    d.dilation_height = d.dilation_width = 1
    d.x_scale = d.r_scale = d.y_scale = 1.0
    return d


def set_window(
    d: Description, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """padding: top, bottom, left, right; the size of the result says what the kernels read at the other sides."""
    d.kernel_height, d.kernel_width = kernel
    d.stride_height, d.stride_width = stride
    d.top, d.left = padding[0], padding[2]
    d.dilation_height, d.dilation_width = dilation


def describe_conv(x: torch.Tensor, y: torch.Tensor, weight: PackedWeight, convolution: Convolution) -> Description:
    """A convolution. It keeps the tensors that it points to beside x, y and the residual, which is not set."""
    stride, padding, dilation, groups = convolution.window
    bias, scale = convolution.bias, convolution.weight_scale
    d = describe(weight.kind, x, y)
    set_window(d, convolution.kernel, stride, padding, dilation)
    d.groups, d.gather = groups, weight.gather
    d.activation, d.slope = ACTIVATIONS[convolution.activation], convolution.negative_slope
    d.weight, d.plain = weight.weight.data_ptr(), weight.plain
    parts = 1 if weight.kind == DEPTHWISE else groups
    kept = [weight.weight]

    def own(values: torch.Tensor) -> int:
        kept.append(padded_vector(values, parts))
        return kept[-1].data_ptr()

    if bias is not None:
        d.bias = own(bias.float())
    if scale is not None and weight.sums is not None:
        zero = convolution.x_zero_point
        d.scale = own(scale * torch.full((), convolution.x_scale))
        if bias is None:
            d.bias = own(torch.zeros_like(scale))
        if convolution.x_nonnegative and x.dtype == torch.int8:
            d.x_type = NONNEGATIVE
        else:
            kept.append(weight.sums * -(128 + zero))
            d.compensation = kept[-1].data_ptr()
            if zero:
                kept.append(weight.sums * -zero)
                d.signed_compensation = kept[-1].data_ptr()
        kept.append(padding_pixel(x.dtype, zero, x.shape[1]))
        d.outside = kept[-1].data_ptr()
    if convolution.out_scale is not None:
        d.y_scale, d.y_zero = convolution.out_scale, convolution.out_zero_point
    d.kept = tuple(kept)
    return d


@functools.lru_cache(maxsize=64)
def padding_pixel(dtype: torch.dtype, zero_point: int, channels: int) -> torch.Tensor:
    """A pixel of int8 or uint8 that stands for zeros."""
    return torch.full((channels,), zero_point + (128 if dtype == torch.uint8 else 0), dtype=dtype)


def describe_convert(
    x: torch.Tensor, y: torch.Tensor, scale: float = 1.0, zero_point: int = 0, marks: torch.Tensor | None = None
) -> Description:
    """``x`` float32 [N, C, H, W] of any strides -> ``y`` channels-last, quantised as these say if it is int8.

    marks: float32, set to NaN where a value is not finite, else to 0; each is of as many of the N H rows.
    """
    d = describe(CONVERT, x, y)
    d.x_image, d.x_channel, d.x_row, d.x_stride = x.stride()
    d.y_scale, d.y_zero = scale, zero_point
    if marks is not None:
        d.marks, d.marks_count = marks.data_ptr(), marks.numel()
    return d


def describe_mark(y: torch.Tensor, marks: torch.Tensor) -> Description:
    """Write NaN over what stands under a NaN of ``marks``, which are one for each image of ``y`` float32 or one for
    all.
    """
    d = describe(MARK, y, y)
    d.marks, d.marks_count = marks.data_ptr(), marks.numel()
    return d


def set_residual(d: Description, residual: torch.Tensor, scale: float = 1.0, zero_point: int = 0) -> None:
    """Add what ``residual`` stands for, channels-last of the shape of the result (or [N, C, 1, 1] for MULTIPLY)."""
    d.residual, d.r_type, d.r_scale, d.r_zero = residual.data_ptr(), TYPES[residual.dtype], scale, zero_point
    d.r_stride = pixel_stride(residual)


def run(descriptions: ctypes.Array[Description] | Description, count: int = 1, threads: int | None = None) -> None:
    """Execute ``count`` descriptions, on PyTorch's threads."""
    native.function("run_steps")(ctypes.addressof(descriptions), count, threads or torch.get_num_threads())


# ---- single calls
def description_of(weight: PackedWeight, x: torch.Tensor, y: torch.Tensor, convolution: Convolution) -> Description:
    """``describe_conv``, or what it returned for the last call that looked like this one."""
    numbers, vectors = convolution[:-2], convolution[-2:]
    key = (x.shape, x.stride(), x.dtype, y.dtype, numbers, *map(id, vectors))
    known = weight.descriptions.get(key, vectors)
    if known is not None:
        return known
    if any(v is not None and version_of(v) < 0 for v in vectors):  # writes into them leave no trace
        return describe_conv(x, y, weight, convolution)
    return weight.descriptions.make(key, vectors, lambda: describe_conv(x, y, weight, convolution))


def run_with(
    description: Description,
    x: torch.Tensor,
    y: torch.Tensor,
    residual: torch.Tensor | None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
) -> None:
    """Run ``description`` on these tensors. It is copied first, so that threads can share it."""
    d = Description.from_buffer_copy(description)
    d.x, d.y = x.data_ptr(), y.data_ptr()
    if residual is not None:
        residual = channels_last(residual)
        set_residual(d, residual, residual_scale, residual_zero_point)
    run(d)
