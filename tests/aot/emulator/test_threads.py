"""What the threads of a warp do together, and where they go their own ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.aot.emulator.programs import M32, execute
from tilewright.aot.emulator import Unsupported


@pytest.mark.parametrize(
    "mode,b,c,source",
    [
        ("bfly", 5, 0x1F, lambda i: i ^ 5),
        ("idx", 3, 0x1F, lambda i: 3),
        ("up", 4, 0, lambda i: i - 4 if i >= 4 else i),
        ("down", 6, 0x1F, lambda i: i + 6 if i + 6 < 32 else i),
        ("bfly", 3, 0x181F, lambda i: i ^ 3),
        ("idx", 2, 0x181F, lambda i: i // 8 * 8 + 2),
        ("down", 3, 0x181F, lambda i: i + 3 if i % 8 + 3 < 8 else i),
    ],
)
def test_shuffle(mode: str, b: int, c: int, source: Callable[[int], int]) -> None:
    a = list(range(100, 132))
    assert execute(f"shfl.sync.{mode}.b32 %r4, %r1, {b}, {c}, -1;", a, a, a) == [100 + source(i) for i in range(32)]


@pytest.mark.parametrize(
    "body,reference",
    [
        (
            "setp.gt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r4, %p1, -1;",
            lambda a: sum((v > 0) << i for i, v in enumerate(a)),
        ),
        (
            "setp.gt.s32 %p1, %r1, 0; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r4, 1, 0, %p2;",
            lambda a: any(v > 0 for v in a),
        ),
        (
            "setp.gt.s32 %p1, %r1, 0; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r4, 1, 0, %p2;",
            lambda a: all(v > 0 for v in a),
        ),
        ("setp.gt.s32 %p1, %r1, -99; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r4, 1, 0, %p2;", lambda a: True),
        ("setp.gt.s32 %p1, %r1, 99; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r4, 1, 0, %p2;", lambda a: False),
        ("redux.sync.add.s32 %r4, %r1, -1;", sum),
        ("redux.sync.min.s32 %r4, %r1, -1;", min),
        ("activemask.b32 %r4;", lambda a: M32),
        ("elect.sync %r5|%p1, -1; selp.b32 %r6, %r1, 0, %p1; shfl.sync.idx.b32 %r4, %r6, 0, 31, -1;", lambda a: a[0]),
    ],
)
def test_warp_wide(body: str, reference: Callable[..., Any]) -> None:
    rng = random.Random(2)
    a = [rng.randrange(-50, 50) for _ in range(32)]
    assert execute(body, [v & M32 for v in a], [0] * 32, [0] * 32) == [int(reference(a)) & M32] * 32


def test_divergent_loop_reconverges() -> None:
    body = """mov.b32 %r4, 0; mov.b32 %r5, 0;
    $top: setp.ge.u32 %p1, %r5, %r8; @%p1 bra $done;
    add.s32 %r5, %r5, 1; and.b32 %r6, %r5, 1; setp.eq.b32 %p2, %r6, 0; @%p2 bra $top; add.s32 %r4, %r4, %r5; bra $top;
    $done: shfl.sync.idx.b32 %r4, %r4, 31, 31, -1;"""
    zero = [0] * 32
    assert execute(body, zero, zero, zero) == [sum(range(1, 32, 2))] * 32


def test_warp_instruction_under_divergence_is_refused() -> None:
    body = "setp.lt.u32 %p1, %r8, 7; @%p1 bra $x; shfl.sync.idx.b32 %r4, %r1, 0, 31, -1; $x:"
    zero = [0] * 32
    with pytest.raises(RuntimeError, match="some threads"):
        execute(body, zero, zero, zero)


def test_unsupported_form_names_the_line() -> None:
    with pytest.raises(Unsupported, match="tex.2d"):
        execute("tex.2d.v4.f32.f32 %r4, %r1, %r2;", [0] * 32, [0] * 32, [0] * 32)
