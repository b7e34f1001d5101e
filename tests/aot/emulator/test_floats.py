"""Single floating-point instructions against Python's floats and torch's conversions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.aot.emulator.programs import M32, bits_f, execute, f_bits, inputs

FLOAT_TO_INT = {
    "cvt.rzi.s32.f32 %r4, %r1;": (math.trunc, -(2**31), 2**31 - 1),
    "cvt.rni.s32.f32 %r4, %r1;": (round, -(2**31), 2**31 - 1),
    "cvt.rmi.s32.f32 %r4, %r1;": (math.floor, -(2**31), 2**31 - 1),
    "cvt.rni.sat.s8.f32 %r4, %r1;": (round, -128, 127),
    "cvt.rzi.u32.f32 %r4, %r1;": (math.trunc, 0, 2**32 - 1),
}


@pytest.mark.parametrize("body", FLOAT_TO_INT)
def test_float_to_integer(body: str) -> None:
    rounding, low, high = FLOAT_TO_INT[body]
    rng = random.Random(3)
    values = [
        0.0,
        -0.0,
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        -2.5,
        127.5,
        128.0,
        -128.5,
        -129.0,
        1e10,
        -1e10,
        2147483520.0,
        4294967040.0,
        math.inf,
        -math.inf,
        math.nan,
        1e-40,
    ] + [rng.uniform(-300, 300) for _ in range(12)]
    words = [f_bits(v) for v in values]

    def reference(x: int) -> int:
        x = bits_f(x)
        if math.isnan(x):
            return 0
        return (high if x > 0 else low) if math.isinf(x) else max(low, min(high, rounding(x)))

    assert execute(body, words, words, words) == [reference(w) & M32 for w in words]


def as_torch(words: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.array(words, np.uint32).view(np.float32)).to(dtype)


def test_float_conversions_match_torch() -> None:
    a, b, _ = inputs(seed=5)
    a = [w & 0x8FFFFFFF | 0x30000000 if i % 2 else w for i, w in enumerate(a)]  # many numbers that float16 can hold
    for dtype, name in ((torch.float16, "f16x2"), (torch.bfloat16, "bf16x2")):
        got = execute(f"cvt.rn.{name}.f32 %r4, %r1, %r2;", a, b, b)
        halves = [x.to(dtype) for x in (as_torch(a), as_torch(b))]
        for shift, expected in ((16, halves[0]), (0, halves[1])):
            mine = torch.from_numpy(np.array([g >> shift & 0xFFFF for g in got], np.uint16).view(np.int16)).view(dtype)
            assert torch.equal(mine.isnan(), expected.isnan())
            keep = ~expected.isnan()
            assert torch.equal(mine[keep].view(torch.int16), expected[keep].view(torch.int16))


@pytest.mark.parametrize("op,function", [("add", torch.add), ("mul", torch.mul), ("sub", torch.sub)])
@pytest.mark.parametrize("kind,dtype", [("f16x2", torch.float16), ("bf16x2", torch.bfloat16), ("f32", torch.float32)])
def test_float_arithmetic(op: str, function: Callable[..., Any], kind: str, dtype: torch.dtype) -> None:
    a, b, _ = inputs(seed=7)
    form = f"{op}.rn.{kind}" if kind == "bf16x2" else f"{op}.{kind}"
    got = torch.from_numpy(np.array(execute(f"{form} %r4, %r1, %r2;", a, b, b), np.uint32).view(np.int32)).view(dtype)
    x, y = (torch.from_numpy(np.array(v, np.uint32).view(np.int32)).view(dtype) for v in (a, b))
    expected = function(x, y)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got[~got.isnan()], expected[~got.isnan()])


@pytest.mark.parametrize(
    "body,function",
    [
        ("min.f32 %r4, %r1, %r2;", lambda a, b: b if math.isnan(a) else a if math.isnan(b) else min(a, b)),
        ("max.NaN.f32 %r4, %r1, %r2;", lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else max(a, b)),
        (
            "setp.ltu.f32 %p1, %r1, %r2; selp.f32 %r4, %r1, %r2, %p1;",
            lambda a, b: a if math.isnan(a) or math.isnan(b) or a < b else b,
        ),
        (
            "setp.ne.f32 %p1, %r1, %r2; selp.f32 %r4, 0f3F800000, 0f00000000, %p1;",
            lambda a, b: float(not (math.isnan(a) or math.isnan(b)) and a != b),
        ),
        (
            "setp.num.f32 %p1, %r1, %r2; selp.f32 %r4, 0f3F800000, 0f00000000, %p1;",
            lambda a, b: float(not (math.isnan(a) or math.isnan(b))),
        ),
        (
            "min.xorsign.abs.f32 %r4, %r1, %r2;",
            lambda a, b: (
                math.nan
                if math.isnan(a) and math.isnan(b)
                else math.copysign(
                    min(x for x in (abs(a), abs(b)) if not math.isnan(x)), math.copysign(1, a) * math.copysign(1, b)
                )
            ),
        ),
    ],
)
def test_float_selection(body: str, function: Callable[..., Any]) -> None:
    values = [0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.5, -2.25]
    a = [f_bits(values[i % 8]) for i in range(32)]
    b = [f_bits(values[(i * 3 + i // 8) % 8]) for i in range(32)]
    for got, x, y in zip(execute(body, a, b, b), a, b, strict=True):
        expected = function(bits_f(x), bits_f(y))
        assert (math.isnan(bits_f(got)) and math.isnan(expected)) or bits_f(got) == expected


def test_tf32_rounds_to_nearest_away() -> None:
    words = [0x3F800000 + i * 0x800 for i in range(16)] + [0xBF801000, 0x7F800000, 0x7F7FFFFF, 0] + [0x3F800FFF] * 12
    expected = [w if w == 0x7F800000 else (w + 0x1000) & 0xFFFFE000 for w in words]
    assert execute("cvt.rna.tf32.f32 %r4, %r1;", words, words, words) == expected
