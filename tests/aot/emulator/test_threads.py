"""What the threads of a warp do together, and where they go their own ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.aot.emulator.programs import M32, execute, program
from tilewright.aot.emulator import PTXError, Unsupported, emulate


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


ZERO = [0] * 32
SOME = "mov.b32 %r4, 99; setp.lt.u32 %p1, %r8, 7; @!%p1 bra $x; {} $x:"


@pytest.mark.parametrize(
    "body,expected",
    [
        ("shfl.sync.idx.b32 %r4, %r8, 3, 31, 0x7F;", [3] * 7),
        ("shfl.sync.bfly.b32 %r4, %r8, 1, 0x1F, 0x3F;", None),
        ("shfl.sync.bfly.b32 %r4, %r8, 1, 0x1F, 0x7F;", None),
        ("setp.gt.u32 %p2, %r8, 2; vote.sync.ballot.b32 %r4, %p2, 0x7F;", [0b1111000] * 7),
        ("setp.gt.u32 %p2, %r8, 2; vote.sync.ballot.b32 %r4, !%p2, 0x7F;", [0b111] * 7),
        ("setp.lt.u32 %p2, %r8, 7; vote.sync.all.pred %p3, %p2, 0x7F; selp.b32 %r4, 5, 6, %p3;", [5] * 7),
        ("redux.sync.max.u32 %r4, %r8, 0x7F;", [6] * 7),
        ("redux.sync.and.b32 %r4, %r8, 0x7F;", [0] * 7),
        ("redux.sync.min.s32 %r4, %r8, 0x7F;", [0] * 7),
        ("elect.sync %r4|%p2, 0x7F;", [0] * 7),
        ("activemask.b32 %r4;", [0x7F] * 7),
    ],
)
def test_part_of_a_warp(body: str, expected: list[int] | None) -> None:
    """The member mask must name those that are there, and a shuffle may read from them alone."""
    if expected is None:
        with pytest.raises(PTXError, match="some threads of its warp only|does not take part"):
            execute(SOME.format(body), ZERO, ZERO, ZERO)
    else:
        assert execute(SOME.format(body), ZERO, ZERO, ZERO) == expected + [99] * 25


def test_a_member_mask_that_leaves_out_a_thread_is_refused() -> None:
    with pytest.raises(PTXError, match="0xffffffff, member mask 0x7fffffff"):
        execute("shfl.sync.idx.b32 %r4, %r1, 0, 31, 0x7FFFFFFF;", ZERO, ZERO, ZERO)


def test_match() -> None:
    a = [i % 5 for i in range(32)]
    same = [sum(1 << j for j in range(32) if j % 5 == i % 5) for i in range(32)]
    assert execute("match.any.sync.b32 %r4, %r1, -1;", a, a, a) == same
    body = "match.all.sync.b32 %r5|%p1, %r1, -1; selp.b32 %r4, %r5, 7, %p1;"
    assert execute(body, a, a, a) == [7] * 32
    assert execute(body, ZERO, ZERO, ZERO) == [M32] * 32


def test_shuffle_reports_whether_the_source_was_in_range() -> None:
    body = "shfl.sync.down.b32 %r5|%p1, %r8, 6, 31, -1; selp.b32 %r4, 1, 0, %p1;"
    assert execute(body, ZERO, ZERO, ZERO) == [1] * 26 + [0] * 6


def test_trap_is_an_error_for_those_who_reach_it() -> None:
    with pytest.raises(PTXError, match="trap executed"):
        execute("setp.gt.u32 %p1, %r8, 30; @%p1 trap;", ZERO, ZERO, ZERO)
    with pytest.raises(PTXError, match="trap executed"):
        execute("setp.lt.u32 %p1, %r8, 31; @%p1 bra $x; trap; $x: mov.b32 %r4, 1;", ZERO, ZERO, ZERO)
    body = "setp.gt.u32 %p1, %r8, 31; mov.b32 %r4, 4; @%p1 trap;"
    assert execute(body, ZERO, ZERO, ZERO) == [4] * 32


def test_threads_that_leave_early_keep_the_others_going() -> None:
    body = "setp.lt.u32 %p1, %r8, 9; st.global.b32 [%rd13], 3; @%p1 ret; mov.b32 %r4, 8;"
    assert execute(body, ZERO, ZERO, ZERO) == [3] * 9 + [8] * 23


def test_endless_loops_are_cut() -> None:
    with pytest.raises(PTXError, match="endless loop"):
        emulate(program("$x: bra $x;"), (1,), 1, [torch.zeros(32, dtype=torch.int32)] * 4, max_blocks=50)


def test_calls_are_refused_by_name() -> None:
    body = "{ .param .b64 p; .param .b32 q; call.uni (q), vprintf, (p, p); }"
    with pytest.raises(Unsupported, match="device_print and device_assert make: vprintf"):
        execute(body, ZERO, ZERO, ZERO)


def test_unsupported_form_names_the_line() -> None:
    with pytest.raises(Unsupported, match="tex.2d"):
        execute("tex.2d.v4.f32.f32 %r4, %r1, %r2;", [0] * 32, [0] * 32, [0] * 32)
