"""Probes of PyTorch's private operators.

PyTorch's oneDNN and int4/int8 pack operators are private: each is probed once, at first use, for being there, being
right on a small case and not being a reference loop, and is refused with the reason otherwise.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch

from tilewright.kernels.formats.weight import Draw


def best_of(count: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest of ``count`` calls."""
    best = math.inf
    for _ in range(count):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


_Case = tuple[torch.Tensor, torch.Tensor, Callable[[], object]]


def _probe(name: str, check: Callable[[Draw], _Case], bound: float) -> str | None:
    """Why a private operator cannot be used, or None. ``check`` returns its result, the expected one, and a call to
    time. What it draws does not come from PyTorch's own generator, whose numbers are the user's.
    """
    draw = Draw()
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            actual, expected, run = check(draw)
            error = (actual.double() - expected.double()).norm() / expected.double().norm()
            if not error <= bound:
                return f"{name} gives wrong results on this CPU (relative error {error:.1e})"
            dense, x = draw.normal(512, 512), draw.normal(32, 512)
            plain = best_of(3, lambda: torch.nn.functional.linear(x, dense))
            ours = best_of(3, run)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        words = str(error) or repr(error)
        return f"{name} is not usable in torch {torch.__version__}: {words.splitlines()[0]}"
    # The reference loops behind these operators are hundreds of times slower than a float32 product.
    if ours > 10 * plain + 1e-3:
        return f"{name} is a slow reference path on this CPU ({ours / plain:.0f} times a float32 product)"
    return None


def qlinear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """(u8 x - 128) [M, K] times a prepacked int8 weight, times weight_scale [N] -> float32 [M, N], through oneDNN; plus
    ``total``, in its place, if that is given.
    """
    product = (x, 1.0, 128, weight, weight_scale, weight_zero)
    rounded = (None, 1.0, 0, torch.float32)
    if total is None:
        return torch.ops.onednn.qlinear_pointwise(*product, *rounded, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.binary(*product, total, *rounded, 1.0, 0, "sum", 1.0, "none", [], "")


def _random_int8(draw: Draw, *shape: int) -> torch.Tensor:
    q = draw.integers(-127, 128, *shape, dtype=torch.int8)
    q[..., : shape[-1] // 2] = 127  # pairs of extreme products overflow 16 bits on CPUs without VNNI
    return q


@functools.cache
def why_no_qlinear() -> str | None:
    """Why oneDNN's quantised linear cannot be used, or None."""

    def check(draw: Draw) -> _Case:
        q, w = _random_int8(draw, 32, 512), _random_int8(draw, 512, 512)
        x = (q.to(torch.int32) + 128).to(torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(w, None)
        scale, zero = draw.positive(512), torch.zeros(512, dtype=torch.int32)
        expected = q.double() @ w.double().t() * scale
        y = qlinear(x, packed, scale, zero)
        y = qlinear(x, packed, scale, zero, y)
        return y, 2 * expected, lambda: qlinear(x, packed, scale, zero)

    return _probe("oneDNN's quantised linear", check, 1e-6)


@functools.cache
def why_no_packed_bfloat16() -> str | None:
    """Why oneDNN's product with a packed bfloat16 weight cannot be used, or None."""

    def check(draw: Draw) -> _Case:
        x, w = draw.normal(32, 512, dtype=torch.bfloat16), draw.normal(512, 512, dtype=torch.bfloat16)
        packed, bias = pack_bfloat16(w), draw.normal(512)
        expected = x.double() @ w.double().t() + bias
        return packed_product(x, packed, bias), expected, lambda: packed_product(x, packed, bias)

    return _probe("oneDNN's product with a packed weight", check, 4e-3)


def pack_bfloat16(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16 [N, K] in the order of oneDNN, for any number of rows: an opaque tensor of as many bytes."""
    # The order for so many rows is quick at all others; without a number 704 rows took 3.5 times as long.
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 512)
    return packed


def packed_product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x bfloat16 [M, K] times what ``pack_bfloat16`` made, plus the bias [N], summed in float32 -> bfloat16 [M, N]."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


@functools.cache
def why_no_int8pack() -> str | None:
    """Why ATen's int8 weight-only product cannot be used, or None."""

    def check(draw: Draw) -> _Case:
        x, w = draw.normal(32, 512, dtype=torch.bfloat16), _random_int8(draw, 512, 512)
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

    def check(draw: Draw) -> _Case:
        x = draw.normal(32, 512, dtype=torch.bfloat16)
        u = draw.integers(0, 16, 512, 512, dtype=torch.int32)
        scale_and_offset = draw.positive(16, 512, 2).bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(u, 1)
        scale, offset = (t.t().double().repeat_interleave(32, 1) for t in scale_and_offset.unbind(-1))
        run = functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, packed, 32, scale_and_offset)
        return run(), x.double() @ ((u - 8) * scale + offset).t(), run

    return _probe("ATen's int4 weight-only product", check, 4e-3)
