"""What the CPU implementations share: scratch memory, the epilogue, and probes of PyTorch's private operators.

Memory that is allocated afresh in each call costs page faults worth a third of a small transformer's time, so
temporaries live in a scratch area for each thread. PyTorch's oneDNN and int4/int8 pack operators are private: each is
probed once, at first use, for being there, being right on a small case and not being a reference loop, and is refused
with the reason otherwise.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable

import torch

from tilewright.kernels.activation import apply_activation

#: Elements of the float32 temporary that activations are quantised in. Blocks that fit a second-level cache would need
#: more parallel regions, whose barriers cost more than the cache saves.
BLOCK_ELEMENTS = 1 << 22
#: Elements of a block of dequantised weights.
WEIGHT_BLOCK_ELEMENTS = 1 << 20
_KEPT_BYTES = 64 << 20
_KEPT_VIEWS = 256
_local = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, slot: str) -> torch.Tensor:
    """Uninitialised memory that this thread's next request for ``slot`` overwrites.

    Two dtypes of one slot are two views of the same memory.
    """
    views = _local.__dict__.setdefault("views", {})
    key = (slot, dtype, shape)
    view = views.get(key)
    if view is None:
        _keep_freed_memory()
        count = math.prod(shape) * dtype.itemsize
        areas = _local.__dict__.setdefault("areas", {})
        area = areas.get(slot)
        if area is None or area.numel() < count:
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                area = torch.empty(count, dtype=torch.uint8)
            if count <= _KEPT_BYTES:
                areas[slot] = area
                views.clear()  # they may hold memory that is not used any more
        with torch.inference_mode(False):
            view = area[:count].view(dtype).view(shape)
        if areas.get(slot) is area:
            if len(views) >= _KEPT_VIEWS:
                views.clear()
            views[key] = view
    return view


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of a few MiB, which layers of this size allocate and free at every call.

    It returns freed memory to the system beyond a threshold, and the next call pays a page fault for every 4 KiB of its
    output: as much time as the product of 800 x 384 x 1536 itself. The threshold follows the largest block that was
    freed (mallopt(3), M_MMAP_THRESHOLD), up to 32 MiB. Other allocators do not mind.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def finish_rows(
    y: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Epilogue in place: ``y`` float32 [M, N] times ``row_scale`` [M, 1], plus bias, activation, plus residual, one
    cast.
    """
    if bias is not None and bias.dtype != y.dtype:
        bias = bias.to(y.dtype)
    if row_scale is not None and bias is not None:
        torch.addcmul(bias, y, row_scale, out=y)
    elif row_scale is not None:
        y.mul_(row_scale)
    elif bias is not None:
        y.add_(bias)
    if activation != "none":
        apply_activation(y, activation, inplace=True)
    if residual is not None:
        y.add_(residual.reshape(y.shape))
    return y if y.dtype == out_dtype else y.to(out_dtype)


def _seconds(run: Callable[[], object], repeats: int = 3) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


_Case = tuple[torch.Tensor, torch.Tensor, Callable[[], object]]


def _probe(name: str, check: Callable[[], _Case], bound: float) -> str | None:
    """Why a private operator cannot be used, or None. ``check`` returns its result, the expected one, and a call to
    time.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            actual, expected, run = check()
            error = (actual.double() - expected.double()).norm() / expected.double().norm()
            if not error <= bound:
                return f"{name} gives wrong results on this CPU (relative error {error:.1e})"
            dense = torch.randn(512, 512)
            x = torch.randn(32, 512)
            plain = _seconds(lambda: torch.nn.functional.linear(x, dense))
            ours = _seconds(run)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        words = str(error) or repr(error)
        return f"{name} is not usable in torch {torch.__version__}: {words.splitlines()[0]}"
    # The reference loops behind these operators are hundreds of times slower than a float32 product.
    if ours > 10 * plain + 1e-3:
        return f"{name} is a slow reference path on this CPU ({ours / plain:.0f} times a float32 product)"
    return None


def qlinear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor
) -> torch.Tensor:
    """(u8 x - 128) [M, K] times a prepacked int8 weight, times weight_scale [N] -> float32 [M, N], through oneDNN."""
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, weight, weight_scale, weight_zero, None, 1.0, 0, torch.float32, "none", [], ""
    )


def qlinear_add(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """``total`` float32 [M, N] plus what ``qlinear`` returns, in place; returns it."""
    return torch.ops.onednn.qlinear_pointwise.binary(
        x,
        1.0,
        128,
        weight,
        weight_scale,
        weight_zero,
        total,
        None,
        1.0,
        0,
        torch.float32,
        1.0,
        0,
        "sum",
        1.0,
        "none",
        [],
        "",
    )


def _random_int8(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    q[..., : shape[-1] // 2] = 127  # pairs of extreme products overflow 16 bits on CPUs without VNNI
    return q


@functools.cache
def why_no_qlinear() -> str | None:
    """Why oneDNN's quantised linear cannot be used, or None."""

    def check() -> _Case:
        q, w = _random_int8(32, 512), _random_int8(512, 512)
        x = (q.to(torch.int32) + 128).to(torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(w, None)
        scale, zero = torch.rand(512), torch.zeros(512, dtype=torch.int32)
        expected = q.double() @ w.double().t() * scale
        y = qlinear(x, packed, scale, zero)
        y = qlinear_add(x, packed, scale, zero, y)
        return y, 2 * expected, lambda: qlinear(x, packed, scale, zero)

    return _probe("oneDNN's quantised linear", check, 1e-6)


@functools.cache
def why_no_int8pack() -> str | None:
    """Why ATen's int8 weight-only product cannot be used, or None."""

    def check() -> _Case:
        x, w = torch.randn(32, 512).bfloat16(), _random_int8(512, 512)
        ones = torch.ones(512, dtype=torch.bfloat16)
        return (
            torch._weight_int8pack_mm(x, w, ones),
            x.double() @ w.double().t(),
            lambda: torch._weight_int8pack_mm(x[:4], w, ones),
        )

    return _probe("ATen's int8 weight-only product", check, 4e-3)


@functools.cache
def why_no_int4pack() -> str | None:
    """Why ATen's int4 weight-only product cannot be used, or None."""

    def check() -> _Case:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 512, generator=generator).bfloat16()
        u = torch.randint(0, 16, (512, 512), generator=generator, dtype=torch.int32)
        scale_and_offset = torch.rand(16, 512, 2, generator=generator).bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(u, 1)
        scale, offset = (t.t().double().repeat_interleave(32, 1) for t in scale_and_offset.unbind(-1))
        run = functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, packed, 32, scale_and_offset)
        return run(), x.double() @ ((u - 8) * scale + offset).t(), run

    return _probe("ATen's int4 weight-only product", check, 4e-3)
