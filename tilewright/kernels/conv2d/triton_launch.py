"""From the signatures of the two convolutions to what their kernels take: layouts, tiles, and what all of them decline.

Every family of kernels serves both operators: float and int8 differ in the dtype of the sums and in the epilogue alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tilewright.aot.launch import Launch
from tilewright.kernels.activation import CONV_ACTIVATIONS, check_activation
from tilewright.kernels.conv_geometry import ConvGeometry, check_sizes, empty_channels_last, to_channels_last
from tilewright.kernels.convolution import INTEGERS, convolution_problem
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.matrices import FLOAT_DTYPES
from tilewright.kernels.triton.common import MAX_K, why_not_on_gpu
from tilewright.kernels.tuning import why_too_large

MAX_ROWS = 2**31 - 1024
MAX_GROUPS = 65535


@dataclass(frozen=True)
class ConvCall:
    """One convolution as the kernels take it. M = N P Q pixels of the result, K = values in the window of one group.

    x [N, H, W, C], channels contiguous. weight OHWI, contiguous. out, residual [M, Co] contiguous. weight_scale: None
    for a float convolution. out_scale: None unless the result is requantised. weight_sum: int32 [Co], sums of the
    weights of each output channel, None unless x has a zero point.
    """

    geometry: ConvGeometry
    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str = "none"
    negative_slope: float = 0.01
    weight_scale: torch.Tensor | None = None
    weight_sum: torch.Tensor | None = None
    x_scale: float = 1.0
    x_zero_point: int = 0
    residual_scale: float = 1.0
    residual_zero_point: int = 0
    out_scale: float | None = None
    out_zero_point: int = 0
    allow_tf32: bool = False

    @property
    def integer(self) -> bool:
        """Whether integers are multiplied."""
        return self.weight_scale is not None

    @property
    def result(self) -> torch.Tensor:
        """``out`` as the operator returns it, [N, Co, P, Q]."""
        n, channels, height, width = self.geometry.out_shape
        return self.out.view(n, height, width, channels).permute(0, 3, 1, 2)

    @property
    def rows(self) -> int:
        """M."""
        return self.out.shape[0]

    @property
    def columns(self) -> int:
        """Output channels of one group."""
        return self.geometry.out_channels // self.geometry.groups

    def problem(self) -> Problem:
        """What a heuristic looks at."""
        op = "int8_conv2d_fused" if self.integer else "conv2d_fused"
        return _problem(op, self.geometry, self.x.dtype, self.allow_tf32, self.x.device)

    def epilogue(self) -> dict[str, Any]:
        """The run-time arguments of ``triton_epilogue.finish_conv_tile``."""
        return {
            "out_ptr": self.out,
            "w_scale_ptr": self.weight_scale,
            "w_sum_ptr": self.weight_sum,
            "bias_ptr": self.bias,
            "residual_ptr": self.residual,
            "x_scale": float(self.x_scale),
            "x_zero": float(self.x_zero_point),
            "residual_scale": float(self.residual_scale),
            "residual_zero": float(self.residual_zero_point),
            "out_scale": 1.0 if self.out_scale is None else float(self.out_scale),
            "out_zero": float(self.out_zero_point),
            "negative_slope": float(self.negative_slope),
        }

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of every kernel but the depthwise one."""
        return {
            "ACTIVATION": self.activation,
            "QUANTIZE": self.out_scale is not None,
            "INTEGER": self.integer,
            "PRECISION": "tf32" if self.allow_tf32 else "ieee",
        }


# What is known from sizes alone is worked out once: in a small network the cost is overhead for each call.
_sizes = functools.lru_cache(maxsize=4096)(check_sizes)


@functools.lru_cache(maxsize=4096)
def _problem(op: str, geometry: ConvGeometry, dtype: torch.dtype, allow_tf32: bool, device: torch.device) -> Problem:
    return convolution_problem(op, geometry, dtype, None, allow_tf32=allow_tf32, **device_facts(device))


def unit(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all ``sizes``.

    Triton promises its compiler only multiples of 16. Sizes are given to a kernel in these units and multiplied there,
    so that 24 channels are known to be a multiple of 8 and still load 16 bytes at a time.
    """
    return math.gcd(16, *sizes)


def why_not_any_kernel(problem: Problem) -> str | None:
    """Why no convolution kernel of ours takes ``problem`` (dtypes, sizes, device), or None."""
    if problem.conv is None:
        return "is for convolutions"
    if problem.x_dtype not in (*FLOAT_DTYPES, *INTEGERS):
        return f"takes float16, bfloat16, float32 and int8, not {problem.x_dtype}"
    if not problem.k:
        return "there are no input channels to add up"
    if problem.x_dtype in INTEGERS and problem.k > MAX_K:
        return f"sums of {problem.k} products may leave int32, which holds {MAX_K}"
    if problem.m > MAX_ROWS:
        return f"counts pixels in 32 bits, {problem.m} are too many"
    if problem.conv.groups > MAX_GROUPS:
        return f"takes up to {MAX_GROUPS} groups, not {problem.conv.groups}"
    return why_not_on_gpu(problem)


@dataclass(frozen=True)
class ConvTile:
    """block_m pixels x block_n output channels, block_k values of the sum at a time.

    epilogue_parts: slices of the tile that the epilogue takes one after another, since scaling, activating and adding a
    residual to all of a large tile at once spills.
    """

    block_m: int
    block_n: int
    block_k: int
    epilogue_parts: int
    num_warps: int
    num_stages: int

    @classmethod
    def for_problem(cls, problem: Problem, depth: int) -> ConvTile:
        """The largest tile that still gives every multiprocessor one. depth: contiguous values of the sum, e.g.
        channels.

        128 bytes of each row at a time where there are as many, so that a warp reads whole cache lines.
        """
        groups = 1 if problem.conv is None else problem.conv.groups
        columns = problem.n // groups
        size = problem.x_dtype.itemsize
        multiprocessors = problem.multiprocessors or 132
        block_n = min(max(triton.next_power_of_2(columns), 16), 128)
        block_k = min(max(triton.next_power_of_2(depth), 32 // size, 16), 128 // size)

        def programs(block_m: int, block_n: int) -> int:
            return triton.cdiv(problem.m, block_m) * triton.cdiv(columns, block_n) * groups

        block_m = 128 if programs(128, block_n) >= multiprocessors else 64
        if block_n == 128 and programs(block_m, block_n) < multiprocessors:
            block_n = 64
        if unit(depth) * size < 8:
            # Many narrow loads: the addresses of more than 32 columns fill the registers.
            block_k = min(block_k, 32)
        if size == 4:  # no room for more float32 operands
            block_m, block_n, block_k = 64, min(block_n, 64), 16
        # With four warps the addresses and sums of 128 x 64 take all 255 registers on 8.x.
        num_warps = 8 if block_m == 128 and block_n >= 64 else 4
        if problem.gpu_arch is not None:
            return cls(block_m, block_n, min(block_k, 64 // size), 1, num_warps, 2)
        num_stages = 3 if block_m * block_n == 128 * 128 else 4
        return cls(block_m, block_n, block_k, 2 if block_n == 128 else 1, num_warps, num_stages)

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of a kernel with tiles."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "EPILOGUE_PARTS": self.epilogue_parts,
        }


def tile_candidates(tile: ConvTile, problem: Problem, stages: Sequence[int]) -> Iterator[ConvTile]:
    """Tiles around the heuristic's ``tile``, with the same depth or half of it."""
    size, amd = problem.x_dtype.itemsize, problem.gpu_arch is not None
    depths = {tile.block_k, max(tile.block_k // 2, 32 // size, 16)}
    for block_m, block_n, block_k in itertools.product((64, 128), (32, 64, 128), sorted(depths)):
        for num_warps, num_stages in itertools.product((4, 8), (2,) if amd else stages):
            parts = 2 if block_n == 128 and not amd else 1
            yield ConvTile(block_m, block_n, block_k, parts, num_warps, num_stages)


def why_not_tile(tile: ConvTile, problem: Problem) -> str | None:
    """The reason why a launch with ``tile`` cannot serve ``problem``, or does so wastefully for sure; or None."""
    groups = 1 if problem.conv is None else problem.conv.groups
    columns = max(triton.next_power_of_2(problem.n // groups), 16)
    if tile.block_n > columns:
        return f"half of {tile.block_n} columns would be empty, there are {problem.n // groups}"
    if problem.x_dtype.itemsize == 4 and tile.block_m * tile.block_n > 64 * 64:
        return "there is no room for more float32 operands in the registers"
    bytes_of_tile = (tile.block_m + tile.block_n) * tile.block_k * problem.x_dtype.itemsize
    return why_too_large(problem, bytes_of_tile, tile.num_stages)


#: Modules that the speed of every convolution depends on.
SHARED_SOURCES = tuple(
    f"tilewright.kernels.{name}" for name in ("conv2d.triton_epilogue", "conv2d.triton_launch", "triton.rounding")
)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """``x`` [N, C, H, W] as [N, H, W, C] with contiguous channels; a view unless channels lie apart."""
    view = x.permute(0, 2, 3, 1)
    return view if view.stride(3) == 1 or view.shape[3] == 1 else view.contiguous()


def weight_sum(weight: torch.Tensor) -> torch.Tensor:
    """int32 [Co] of an int8 OHWI weight; made once for each weight."""
    return packed(weight, "conv sums", lambda: weight.detach().sum((1, 2, 3), dtype=torch.int32))


def _as_rows(y: torch.Tensor) -> torch.Tensor:
    """[N, Co, P, Q] -> [M, Co] contiguous; a view where ``y`` is channels-last."""
    y = to_channels_last(y)
    return y.permute(0, 2, 3, 1).view(math.prod((y.shape[0], *y.shape[2:])), y.shape[1])


def make_call(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    x_nonnegative: bool = False,
    **rest: Any,
) -> ConvCall:
    """What the kernels take for these arguments of ``op``; the result is allocated. rest: of ``ConvCall``."""
    check_activation(activation, CONV_ACTIVATIONS)
    geometry = _sizes(op, x.shape, weight.shape, tuple(stride), tuple(padding), tuple(dilation), groups)
    if "weight_scale" in rest:
        rest["weight_scale"] = rest["weight_scale"].contiguous()
        if rest.get("x_zero_point"):
            rest["weight_sum"] = weight_sum(weight)
        dtype = out_dtype or (torch.float32 if rest.get("out_scale") is None else torch.int8)
    else:
        dtype = x.dtype
    return ConvCall(
        geometry,
        nhwc(x),
        weight.contiguous(),
        _as_rows(empty_channels_last(geometry.out_shape, dtype, x.device)),
        None if bias is None else bias.contiguous(),
        None if residual is None else _as_rows(residual),
        activation,
        **rest,
    )


#: Of the arguments of the two operators.
float_call = functools.partial(make_call, "conv2d_fused")
int8_call = functools.partial(make_call, "int8_conv2d_fused")


def window_launch(call: ConvCall, channels: int, columns: int, weight: torch.Tensor) -> tuple[dict[str, Any], ...]:
    """Run-time arguments and constants of a kernel that finds the windows of its pixels, but for its tile.

    channels, columns: of x and of the result that a program's weights are for; both are counted in units.
    """
    geometry = call.geometry
    image, row, pixel_stride, _ = call.x.stride()
    unit_c, unit_n = unit(channels, image, row, pixel_stride), unit(columns)
    args = {
        "x_ptr": call.x,
        "w_ptr": weight,
        **call.epilogue(),
        "M": call.rows,
        "H": geometry.height,
        "W": geometry.width,
        "P": geometry.out_height,
        "Q": geometry.out_width,
        "pad_top": geometry.padding[0],
        "pad_left": geometry.padding[2],
        "x_image_units": image // unit_c,
        "x_row_units": row // unit_c,
        "x_pixel_units": pixel_stride // unit_c,
        "n_units": columns // unit_n,
    }
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W")
    window = dict(zip(names, (*geometry.kernel, *geometry.stride, *geometry.dilation), strict=True))
    return args, {**window, "UNIT_C": unit_c, "UNIT_N": unit_n}


def operators(plan: Callable[[ConvCall], list[Launch]]) -> tuple[Callable[..., torch.Tensor], ...]:
    """``conv2d_fused`` and ``int8_conv2d_fused`` through the kernel that ``plan`` launches."""

    def through(make_call: Callable[..., ConvCall]) -> Callable[..., torch.Tensor]:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            call = make_call(*args, **kwargs)
            if call.out.numel():
                for launch in plan(call):
                    launch.run()
            return call.result

        return run

    return through(float_call), through(int8_call)
