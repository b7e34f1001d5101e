"""Rounding, saturation and not-a-number of floating-point instructions, against exact rational arithmetic."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.aot.emulator.programs import M32, M64, bits_f, execute, f_bits, s
from tilewright.aot.emulator import Unsupported
from tilewright.aot.emulator.numerics import FLOAT8, to_float8

NAN = math.nan
MODES = ("rn", "rz", "rm", "rp")


def rounded(exact: Fraction, mode: str, mantissa: int = 24, least: int = -149, top: int = 128) -> float:
    """``exact`` as the float with so many bits (hidden one included) that ``mode`` names; unlimited beyond ``top``."""
    if exact == 0:
        return 0.0
    exponent = math.frexp(float(exact))[1]  # at most one off, which the loop below mends
    while abs(exact) >= Fraction(2) ** exponent:
        exponent += 1
    while abs(exact) < Fraction(2) ** (exponent - 1):
        exponent -= 1
    quantum = Fraction(2) ** max(exponent - mantissa, least)
    whole = exact / quantum
    down = math.floor(whole)
    nearest = down if whole - down < Fraction(1, 2) or (whole - down == Fraction(1, 2) and down % 2 == 0) else down + 1
    number = {"rn": nearest, "rm": down, "rp": math.ceil(whole), "rz": math.trunc(whole)}[mode]
    assert abs(number * quantum) < Fraction(2) ** top, "the test's operands must not overflow"
    return float(number * quantum)


def operands(seed: int) -> list[int]:
    """Float32 words whose sums and products are often ties, or a hair off them."""
    rng = random.Random(seed)
    words = []
    for _ in range(32):
        mantissa = rng.choice([0, 1, 2, 0x7FFFFF, 0x400000, 1 << rng.randrange(23), rng.getrandbits(23)])
        words.append(rng.getrandbits(1) << 31 | rng.choice([127, 126, 115, 103, 102, 139, 100]) << 23 | mantissa)
    return words


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma", "div"])
def test_float32_results_are_rounded_once(name: str, mode: str) -> None:
    exact = {
        "add": lambda a, b, c: a + b,
        "sub": lambda a, b, c: a - b,
        "mul": lambda a, b, c: a * b,
        "fma": lambda a, b, c: a * b + c,
        "div": lambda a, b, c: a / b,
    }[name]
    third = ", %r3" if name == "fma" else ""
    for seed in range(8):
        words = [operands(3 * seed + i) for i in range(3)]
        got = execute(f"{name}.{mode}.f32 %r4, %r1, %r2{third};", *words)
        for result, *given in zip(got, *words, strict=True):
            assert bits_f(result) == rounded(exact(*(Fraction(bits_f(word)) for word in given)), mode)


def test_a_fused_product_is_not_rounded_before_the_sum() -> None:
    """(1 + 2^-12)(1 - 2^-12) 2^-24 + 1 + 2^-23 lies just below a tie, which float64 would turn into one."""
    a, b, c = ([f_bits(x)] * 32 for x in ((1 + 2.0**-12) * 2.0**-24, 1 - 2.0**-12, 1 + 2.0**-23))
    far = [f_bits((1 + 2.0**-23) * 2.0**-24)] * 32, [f_bits(1 - 2.0**-23)] * 32
    assert execute("fma.rn.f32 %r4, %r1, %r2, %r3;", a, b, c) == c
    assert execute("fma.rn.f32 %r4, %r1, %r2, %r3;", *far, c) == c


def test_bfloat16_fused_products_are_rounded_once() -> None:
    """(1 + 2^-4)^2 is a tie between bfloat16 numbers; 2^-30 more or less must decide it, and is lost in float32."""
    a, c = 0x3F88, 0x3080
    words = [[word << 16 | other] * 32 for word, other in ((a, a), (a, a), (c, c | 0x8000))]
    got = execute("fma.rn.bf16x2 %r4, %r1, %r2, %r3;", *words)[0]
    factor, part = Fraction(bits_f(a << 16)), Fraction(bits_f(c << 16))
    assert bits_f(got >> 16 << 16) == rounded(factor * factor + part, "rn", 8, -133)
    assert bits_f((got & 0xFFFF) << 16) == rounded(factor * factor - part, "rn", 8, -133)


def half(word: int) -> float:
    return struct.unpack("<e", struct.pack("<H", word & 0xFFFF))[0]


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_conversion_to_a_pair_rounds_as_asked(kind: str, mode: str) -> None:
    a, b = operands(40), operands(41)
    narrow = [w & 0x8FFFFFFF | 0x30000000 for w in a]  # what float16 holds
    got = execute(f"cvt.{mode}.{kind}.f32 %r4, %r1, %r2;", narrow, b if kind == "bf16x2" else narrow, b)
    bits, least = (11, -24) if kind == "f16x2" else (8, -133)
    for result, word in zip(got, narrow, strict=True):
        high = half(result >> 16) if kind == "f16x2" else bits_f(result >> 16 << 16)
        assert high == rounded(Fraction(bits_f(word)), mode, bits, least)


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_tf32_rounds_as_asked(mode: str) -> None:
    words = [0x3F800000 + i * 0x800 for i in range(16)] + [0xBF801000, 0xBF803000, 0x7F800000, 0] + [0x3F800FFF] * 12
    got = execute(f"cvt.{mode}.tf32.f32 %r4, %r1;", words, words, words)
    for result, word in zip(got, words, strict=True):
        infinite = math.isinf(bits_f(word))
        assert bits_f(result) == (math.inf if infinite else rounded(Fraction(bits_f(word)), mode, 11, -136))


@pytest.mark.parametrize("kind,mantissa", [("bf16", 8), ("f16", 11)])
@pytest.mark.parametrize("source", ["s32", "u32", "s16"])
def test_integers_become_floats_in_one_rounding(source: str, kind: str, mantissa: int) -> None:
    """2^24 + 2^16 + 1 is just above a tie of bfloat16, and float32 would make it one."""
    numbers = [(1 << 24) + (1 << 16) + 1, (1 << 24) + (1 << 16) - 1, 2049, 2051, 257, 259, 65519, 5]
    if source != "u32":
        numbers += [-number for number in numbers]
    words = [number & M32 for number in numbers for _ in range(32 // len(numbers))]
    got = execute(f"cvt.rn.{kind}.{source} %rs1, %r1; cvt.u32.u16 %r4, %rs1;", words, words, words)
    for result, word in zip(got, words, strict=True):
        value = s(word & 0xFFFF, 16) if source == "s16" else s(word) if source == "s32" else word
        result_number = half(result) if kind == "f16" else bits_f(result << 16)
        if abs(value) < 65520 or kind == "bf16":
            assert result_number == rounded(Fraction(value), "rn", mantissa)
        else:
            assert math.isinf(result_number)


@pytest.mark.parametrize("mode", MODES)
def test_integers_become_float32_as_asked(mode: str) -> None:
    words = [(1 << 24) + 1, (1 << 24) + 3, M32, (1 << 31) - 65, 1 << 30, 7, 0, (1 << 25) + 2] * 4
    got = execute(f"cvt.{mode}.f32.s32 %r4, %r1;", words, words, words)
    assert [bits_f(g) for g in got] == [rounded(Fraction(s(w)), mode) for w in words]


def test_wide_integers_become_bfloat16_in_one_rounding() -> None:
    words = [(1 << 60) + (1 << 52) + 1, (1 << 60) + (1 << 52) - 1, M64, (1 << 60) + (3 << 52)] * 8
    body = "cvt.rn.bf16.s64 %rs1, %rd1; cvt.u64.u16 %rd4, %rs1;"
    got = execute(body, words, words, words, 64)
    assert [bits_f(g << 16) for g in got] == [rounded(Fraction(s(w, 64)), "rn", 8) for w in words]


@pytest.mark.parametrize("mode", MODES)
def test_float64_becomes_float32_as_asked(mode: str) -> None:
    numbers = [1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-52, -1 - 2.0**-24, 2.0**-150 * 1.5, 1e30, -0.1, 3.0, 2.0**-149]
    words = [struct.unpack("<Q", struct.pack("<d", number))[0] for number in numbers] * 4
    got = execute(f"cvt.{mode}.f32.f64 %r4, %rd1; cvt.u64.u32 %rd4, %r4;", words, words, words, 64)
    assert [bits_f(g) for g in got] == [rounded(Fraction(number), mode) for number in numbers * 4]


@pytest.mark.parametrize(
    "body,expected",
    [
        ("cvt.rzi.s64.f32 %rd4, %r1;", 1 << 63),
        ("cvt.rzi.u64.f32 %rd4, %r1;", 1 << 63),
        ("cvt.f64.f32 %rd5, %r1; cvt.rzi.s32.f64 %r5, %rd5; cvt.u64.u32 %rd4, %r5;", 1 << 31),
        ("cvt.f64.f32 %rd5, %r1; cvt.rzi.s64.f64 %rd4, %rd5;", 1 << 63),
        ("cvt.rzi.s32.f32 %r5, %r1; cvt.u64.u32 %rd4, %r5;", 0),
    ],
)
def test_not_a_number_as_an_integer(body: str, expected: int) -> None:
    """Zero, but the lone top bit where source or destination has 64 bits (PTX ISA, "cvt")."""
    words = [f_bits(NAN)] * 32
    assert execute("cvt.u32.u64 %r1, %rd1; " + body, words, words, words, 64) == [expected] * 32


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("value", [-math.inf, -5.0, -0.0, NAN, 3.0], ids=str)
def test_relu_gives_plus_zero_or_keeps_the_number(kind: str, value: float) -> None:
    words = [f_bits(value)] * 32
    got = execute(f"cvt.rn.relu.{kind}.f32 %r4, %r1, %r1;", words, words, words)[0] & 0xFFFF
    number = half(got) if kind == "f16x2" else bits_f(got << 16)
    if math.isnan(value):
        assert math.isnan(number)
    else:
        assert number == max(value, 0.0) and math.copysign(1, number) == 1


@pytest.mark.parametrize("kind,largest", [("f16x2", 0x7BFF), ("bf16x2", 0x7F7F)])
@pytest.mark.parametrize("value", [math.inf, -math.inf, 3.39e38, -3.4e38], ids=str)
def test_satfinite_stops_at_the_largest_number(kind: str, largest: int, value: float) -> None:
    words = [f_bits(value)] * 32
    got = execute(f"cvt.rn.satfinite.{kind}.f32 %r4, %r1, %r1;", words, words, words)[0] & 0xFFFF
    assert got == largest | (0x8000 if value < 0 else 0)


@pytest.mark.parametrize("name,expected", [("min", 0x80000000), ("max", 0)])
@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_minus_zero_is_less_than_plus_zero(name: str, nan: str, expected: int) -> None:
    plus, minus = [0] * 32, [0x80000000] * 32
    for a, b in ((plus, minus), (minus, plus)):
        assert execute(f"{name}{nan}.f32 %r4, %r1, %r2;", a, b, b) == [expected] * 32


@pytest.mark.parametrize("body", ["abs.ftz.f32 %r4, %r1;", "neg.ftz.f32 %r4, %r1; neg.f32 %r4, %r4;"])
def test_signs_flush_subnormals(body: str) -> None:
    words = [1, 0x007FFFFF, 0x00800000, 0x3F800000] * 8
    assert execute(body, words, words, words) == [0, 0, 0x00800000, 0x3F800000] * 8


@pytest.mark.parametrize("kind,tiny,least", [("f16x2", 0x03FF, 0x0400), ("bf16x2", 0x007F, 0x0080)])
def test_halves_flush_subnormals(kind: str, tiny: int, least: int) -> None:
    """2^x of a flushed x is 1, and a subnormal result is flushed."""
    one = 0x3C00 if kind == "f16x2" else 0x3F80
    words = [least << 16 | tiny] * 32
    assert execute(f"ex2.approx.ftz.{kind} %r4, %r1;", words, words, words) == [one << 16 | one] * 32
    if kind == "f16x2":
        assert execute(f"mul.ftz.{kind} %r4, %r1, 0x38003C00;", words, words, words) == [0] * 32


def test_saturation_of_not_a_number_and_of_minus_zero() -> None:
    words = [f_bits(x) for x in (NAN, -0.0, -3.0, 0.25, 7.0, math.inf, -math.inf, 1.0)] * 4
    expected = [f_bits(x) for x in (0.0, 0.0, 0.0, 0.25, 1.0, 1.0, 0.0, 1.0)] * 4
    assert execute("add.sat.f32 %r4, %r1, 0f80000000;", words, words, words) == expected
    assert execute("cvt.sat.f32.f32 %r4, %r1;", words, words, words) == expected


def test_decimal_literals_take_the_width_of_the_operand() -> None:
    zero = [0] * 32
    assert execute("mov.f32 %r4, 1.5;", zero, zero, zero) == [f_bits(1.5)] * 32


@pytest.mark.parametrize(
    "body",
    [
        "add.rn.frobnicate.f32 %r4, %r1, %r2;",
        "sqrt.approx.frobnicate.f32 %r4, %r1;",
        "cvt.rs.f16x2.f32 %r4, %r1, %r2, %r3;",
        "cvt.f32.f64 %r4, %rd1;",
        "min.frobnicate.f32 %r4, %r1, %r2;",
        "fma.rm.f16x2 %r4, %r1, %r2, %r3;",
        "setp.lt.frobnicate.f32 %p1, %r1, %r2;",
        "lop3.or.b32 %r4, %r1, %r2, %r3, 0xEA;",
    ],
)
def test_modifiers_that_are_not_known_are_refused(body: str) -> None:
    zero = [0] * 32
    with pytest.raises(Unsupported, match="cannot decode"):
        execute(body, zero, zero, zero)


def defined_float8(exponent_bits: int) -> torch.Tensor:
    """Values of the 128 positive codes, as "OCP 8-bit Floating Point Specification" has them."""
    mantissa_bits, bias = 7 - exponent_bits, (1 << exponent_bits - 1) - 1
    code = torch.arange(128)
    exponent, mantissa = code >> mantissa_bits, (code & (1 << mantissa_bits) - 1).double() / (1 << mantissa_bits)
    power = torch.where(exponent == 0, 1 - bias, exponent - bias).double()
    value = torch.where(exponent == 0, mantissa, 1 + mantissa) * 2**power
    if exponent_bits == 4:
        value[127] = math.nan
    else:
        value[124:] = torch.tensor([math.inf, math.nan, math.nan, math.nan])
    return value


@pytest.mark.parametrize("kind,exponent_bits", [("e4m3", 4), ("e5m2", 5)])
def test_eight_bit_floats_are_as_specified(kind: str, exponent_bits: int) -> None:
    positive = defined_float8(exponent_bits)
    every = torch.cat([positive, -positive])
    assert torch.equal(torch.from_numpy(FLOAT8[kind]).nan_to_num(1e9), every.nan_to_num(1e9))
    finite = every[every.isfinite()]
    ties = (finite.sort().values[1:] + finite.sort().values[:-1]) / 2
    numbers = torch.cat([finite, ties, ties * 1.001, ties * 0.999, torch.randn(4096).double() * 20]).float()
    mine = torch.from_numpy(to_float8(numbers.numpy(), kind))
    levels = positive[positive.isfinite()]
    distance = (numbers.double().abs()[:, None] - levels).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = torch.arange(len(levels)) % 2 == 0
    code = (nearest.int() * (1 + even.int())).argmax(1)
    assert torch.equal(mine.long(), code + 128 * numbers.signbit())
    assert list(to_float8(np.array([np.nan, np.inf, -np.inf], np.float32), kind)) == [
        127,
        len(levels) - 1,
        len(levels) + 127,
    ]


def test_eight_bit_floats_convert_in_pairs() -> None:
    x, y = (torch.randn(32) * 100 for _ in range(2))
    words = [[f_bits(float(v)) for v in t] for t in (x, y)]
    body = "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2; cvt.rn.f16x2.e4m3x2 %r4, %rs1;"
    for got, high, low in zip(execute(body, *words, words[0]), x, y, strict=True):
        expected = [float(v.clamp(-448, 448).to(torch.float8_e4m3fn).float()) for v in (high, low)]
        assert [half(got >> 16), half(got)] == expected
