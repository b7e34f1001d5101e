"""The convolution kernels with the configurations that they are launched with, for the table of compiled kernels.

Layers are those of ResNet-50, ResNeXt, MobileNetV2 and ConvNeXt, batch 1 and more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.catalogue import MULTIPROCESSORS, Entry, describe
from bench.conv_problems import INTEGERS, ConvShape, make_conv_arguments
from bench.counts import Small
from tilewright.aot.launch import Launch
from tilewright.aot.specialize import specialize
from tilewright.aot.targets import Target
from tilewright.kernels.conv2d import triton_depthwise, triton_implicit, triton_pointwise, triton_stem
from tilewright.kernels.conv2d.triton_launch import ConvCall, float_call, int8_call
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.int8_conv2d.triton_quantize import plan_quantize_per_tensor


@dataclass(frozen=True)
class ConvFamily:
    """The kernels of one implementation. plan: launches for a call and a config; choose, why_not: the module's."""

    name: str
    plan: Callable[..., list[Launch]]
    choose: Callable[[Problem], Any]
    why_not: Callable[[Problem], str | None]


CONV_FAMILIES = {
    name: ConvFamily(f"conv2d {name}", getattr(module, f"plan_{name}"), module.choose, module.why_not)
    for name, module in (
        ("pointwise", triton_pointwise),
        ("implicit", triton_implicit),
        ("stem", triton_stem),
        ("depthwise", triton_depthwise),
    )
}


def make_call(shape: ConvShape, device: str = "cpu") -> ConvCall:
    """``shape`` as the kernels take it: ``poisoned_call``."""
    return poisoned_call(shape.op, make_conv_arguments(shape, device))


def poisoned_call(op: str, arguments: dict[str, Any]) -> ConvCall:
    """``arguments`` of ``op`` as the kernels take them, with the result poisoned: NaN, or the largest integer."""
    call = (int8_call if op == "int8_conv2d_fused" else float_call)(**arguments)
    call.out.fill_(127 if call.out.dtype in INTEGERS else torch.nan)
    return call


def problem_on(call: ConvCall, target: Target) -> Problem:
    """The problem that ``call`` poses on ``target``."""
    major, minor = divmod(int(target.arch), 10) if target.backend == "cuda" else (0, 0)
    return replace(
        call.problem(),
        device="cuda",
        capability=(major, minor) if target.backend == "cuda" else None,
        gpu_arch=str(target.arch) if target.backend == "hip" else None,
        multiprocessors=MULTIPROCESSORS[target.name],
    )


_FULL: dict[str, Any] = {"residual": True, "activation": "relu"}
_LAYERS = {
    "pointwise": (
        ("", ConvShape(32, 256, 56, 64, **_FULL)),
        (" strided", ConvShape(32, 256, 56, 512, stride=2)),
        (" batch 1", ConvShape(1, 1024, 14, 256, **_FULL)),
        (" 24 channels", ConvShape(32, 24, 56, 144, activation="relu6")),
    ),
    "implicit": (
        ("", ConvShape(32, 64, 56, 64, 3, **_FULL)),
        ("", ConvShape(32, 256, 14, 256, 3, **_FULL)),
        ("", ConvShape(256, 512, 14, 512, 3, **_FULL)),
        ("", ConvShape(256, 1024, 14, 1024, 3, activation="silu")),
        (" batch 1", ConvShape(1, 512, 7, 512, 3, **_FULL)),
        (" batch 1", ConvShape(1, 1024, 7, 1024, 3, **_FULL)),
        (" grouped", ConvShape(32, 512, 28, 512, 3, groups=32, activation="relu")),
    ),
    "stem": (
        (" 7 x 7", ConvShape(32, 3, 224, 64, 7, 2, activation="relu")),
        (" 3 x 3", ConvShape(1, 3, 224, 32, 3, 2, activation="hardswish")),
    ),
    "depthwise": (
        (" 3 x 3", ConvShape(32, 144, 56, 144, 3, groups=144, activation="relu6")),
        (" 7 x 7", ConvShape(32, 96, 56, 96, 7, groups=96)),
    ),
}
#: Multiples of nothing: no 16-byte load is to be expected.
_RAGGED = {
    "pointwise": ConvShape(3, 77, 13, 101, **_FULL),
    "implicit": ConvShape(3, 77, 13, 101, (3, 2), (2, 1), (1, 0, 1, 2), (1, 2), **_FULL),
    "depthwise": ConvShape(3, 77, 13, 77, 3, groups=77, **_FULL),
}


def _shapes(family: str) -> Iterator[tuple[str, ConvShape]]:
    for name, layer in _LAYERS[family]:
        yield f"bf16{name}", layer
        yield f"int8{name}", replace(layer, dtype=torch.int8)
    first = _LAYERS[family][0][1]
    yield "fp32", replace(first, dtype=torch.float32)
    if family in ("pointwise", "implicit"):
        yield "fp16", replace(first, dtype=torch.float16)
        yield "tf32", replace(first, dtype=torch.float32, allow_tf32=True)
    if family in ("implicit", "depthwise"):
        yield "uint8", replace(first, dtype=torch.uint8)
    if family != "pointwise":
        yield "int8 zero point", replace(first, dtype=torch.int8, zero_points=(-127, 40, -9))
    if family in _RAGGED:
        yield "bf16 ragged", _RAGGED[family]
        yield "int8 ragged", replace(_RAGGED[family], dtype=torch.int8)


def conv_launches_for(target: Target) -> Iterator[Entry]:
    """Every kernel that the layers above need on ``target``, each variant and config once."""
    seen: set[tuple] = set()
    for short, family in CONV_FAMILIES.items():
        for variant, shape in _shapes(short):
            call = make_call(shape, "meta")
            config = family.choose(problem_on(call, target))
            for index, launch in enumerate(family.plan(call, config)):
                small = functools.partial(_small_launch, family, shape, config, target, index)
                entry = Entry(family.name, launch.kernel.__name__, variant, _in_words(config), launch, small)
                binary = (entry.kernel, str(specialize(launch, target)), launch.num_warps, launch.num_stages)
                if entry.key not in seen and binary not in seen:
                    seen |= {entry.key, binary}
                    yield entry
    x = torch.empty(32, 64, 56, 56, device="meta", memory_format=torch.channels_last)
    for variant, image in (("fp32", x), ("bf16", x.bfloat16())):
        for launch in plan_quantize_per_tensor(image, 0.1, torch.empty_like(image, dtype=torch.int8)):
            small = functools.partial(_small_quantize, image.dtype)
            yield Entry(
                "int8_conv2d quantize", launch.kernel.__name__, variant, "block=2048 num_warps=4", launch, small
            )


def _in_words(config: Any) -> str:
    if isinstance(config, triton_implicit.ImplicitConfig):
        return f"{describe(config.tile)} flat={int(config.flat)}"
    return describe(config)


def _small_quantize(dtype: torch.dtype, depth: int) -> Small | None:
    if depth > 1:
        return None
    image = torch.randn(2, 64, 8, 8).to(dtype=dtype, memory_format=torch.channels_last)
    return Small(plan_quantize_per_tensor(image, 0.1, torch.empty_like(image, dtype=torch.int8))[0])


def _small_launch(
    family: ConvFamily, shape: ConvShape, config: Any, target: Target, index: int, depth: int
) -> Small | None:
    """The launch number ``index`` for a small image with the specialisation that ``shape`` gives it, or None.

    depth: 1, or 2 for two or three times the channels.
    """

    def planned(size: ConvShape, device: str) -> Launch:
        return family.plan(make_call(size, device), config)[index]

    required = specialize(planned(shape, "meta"), target)
    for sizes in _small_shapes(shape):
        if all(specialize(planned(size, "meta"), target) == required for size in sizes):
            if depth > len(sizes):
                return None
            call = make_call(sizes[depth - 1])
            return Small(family.plan(call, config)[index], call.problem().k)
    return None


def _small_shapes(shape: ConvShape) -> Iterator[tuple[ConvShape, ...]]:
    """Smaller images, with few channels and with two or three times as many; then, for layers whose channels are no
    matter of choice, smaller images alone.
    """
    few = {shape.channels} if shape.channels <= 256 else set()
    images = [
        replace(shape, batch=min(batch, shape.batch), size=size)
        for batch in (1, 2, 3, 16)
        for size in (4, 7, 8, 13, 14, 16, 28, 32)
    ]
    if shape.groups == 1 and shape.channels > 4:
        for times, image, channels in itertools.product((2, 3), images, sorted({64, 256, *few})):
            small = replace(image, channels=channels, out_channels=min(shape.out_channels, 256))
            yield small, replace(small, channels=times * channels)
    yield from ((image,) for image in images)
