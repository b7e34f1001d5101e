"""Global memory: bounds, alignment, atomics and races between CTAs; and what is counted of the accesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewright.aot.emulator import OutOfBounds, PTXSyntaxError, RaceError, Stats, emulate


def run(body: str, *args: Any, grid: tuple[int, ...] = (1,), warps: int = 1, **options: Any) -> Stats:
    """Run ``body`` on up to four arguments a, b, c (64 bits, in %rd0 to %rd2) and n (32 bits, in %r0).

    %r1 is the thread in its CTA, %r2 the CTA, %r3 the thread in the grid, %rd3 four times that.
    """
    text = f"""
.version 8.7
.target sm_80
.address_size 64
.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c, .param .u32 n, .param .u64 s0, .param .u64 s1)
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>;
    ld.param.b64 %rd0, [a]; ld.param.b64 %rd1, [b]; ld.param.b64 %rd2, [c]; ld.param.b32 %r0, [n];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mad.lo.s32 %r3, %r2, {32 * warps}, %r1;
    mul.wide.u32 %rd3, %r3, 4;
    {body}
    ret;
}}"""
    return emulate(text, grid, warps, [*args, *[None] * (4 - len(args))], **options)


def ints(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


COPY = "add.s64 %rd4, %rd0, %rd3; add.s64 %rd5, %rd1, %rd3; ld.global.b32 %r4, [%rd4]; st.global.b32 [%rd5], %r4;"


def test_an_offset_that_wraps_is_out_of_bounds() -> None:
    """Row 33,000 of 70,000 columns lies beyond 2^31: in 32 bits the offset turns negative."""
    x, y = ints(64), ints(64)
    body = "mov.b32 %r4, 33000; mul.lo.s32 %r4, %r4, 70000; cvt.s64.s32 %rd4, %r4; add.s64 %rd4, %rd4, %rd1; "
    with pytest.raises(OutOfBounds, match="bytes before b int32"):
        run(body + "ld.global.b8 %rs1, [%rd4];", x, y)


@pytest.mark.parametrize("jump", [1 << 20, 5 << 20, 3 << 30, (1 << 33) - 256, -(1 << 31)], ids=hex)
def test_a_wild_pointer_meets_no_other_tensor(jump: int) -> None:
    with pytest.raises(OutOfBounds):
        run(f"add.s64 %rd4, %rd0, {jump}; ld.global.b32 %r4, [%rd4];", ints(64), ints(64), ints(64))


def test_a_null_pointer_is_named() -> None:
    with pytest.raises(OutOfBounds, match="null pointer"):
        run("ld.global.b32 %r4, [%rd1];", ints(64))


@pytest.mark.parametrize("batch", [1, 4])
def test_ctas_that_store_where_others_read_are_caught_in_either_order(batch: int) -> None:
    """Each CTA reads its neighbour's part, and then stores its own in place."""
    neighbour = "xor.b32 %r5, %r3, {}; mul.wide.u32 %rd4, %r5, 4; add.s64 %rd4, %rd4, %rd0; ld.global.b32 %r4, [%rd4]; "
    store = "add.s64 %rd5, %rd0, %rd3; st.global.b32 [%rd5], 7;"
    run(neighbour.format(1) + store, ints(128), grid=(4,), cta_races=True, batch=batch)
    with pytest.raises(
        RaceError, match="writes bytes of a that CTA number . read|reads bytes of a that CTA number . stored"
    ):
        run(neighbour.format(32) + store, ints(128), grid=(4,), cta_races=True, batch=batch)


def test_bytes_that_every_cta_reads_are_no_race() -> None:
    y = ints(128)
    run(
        "ld.global.b32 %r4, [%rd0]; add.s64 %rd5, %rd1, %rd3; st.global.b32 [%rd5], %r4;",
        ints(1),
        y,
        grid=(4,),
        cta_races=True,
    )


@pytest.mark.parametrize(
    "body,expected",
    [
        ("red.global.add.u32 [%rd0], %r3;", sum(range(64))),
        ("red.global.max.s32 [%rd0], %r3;", 63),
        ("red.global.or.b32 [%rd0], %r3;", 63),
        ("red.global.xor.b32 [%rd0], %r3;", 0),
        ("atom.global.exch.b32 %r4, [%rd0], %r3;", 63),
        ("atom.global.cas.b32 %r4, [%rd0], %r3, 1000;", 1000),
        ("atom.global.gpu.acq_rel.add.u32 %r4, [%rd0], 1;", 64),
    ],
)
def test_atomics_on_one_address(body: str, expected: int) -> None:
    x = ints(4)
    run(body, x, grid=(2,))
    assert x.tolist() == [expected, 0, 0, 0]


@pytest.mark.parametrize("kind,dtype", [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_packed_atomics(kind: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, dtype=dtype)
    run(f"mov.b32 %r4, {0x40003C00 if kind == 'f16x2' else 0x40003F80}; red.global.add.noftz.{kind} [%rd0], %r4;", x)
    assert x.tolist() == [32, 64]


def test_atomics_return_what_was_before_and_add_vectors() -> None:
    x, y = ints(1), ints(32)
    run("atom.global.add.u32 %r4, [%rd0], 2; add.s64 %rd5, %rd1, %rd3; st.global.b32 [%rd5], %r4;", x, y)
    assert y.tolist() == list(range(0, 64, 2))
    z = torch.zeros(4)
    run("mov.b32 %r4, 0f3F800000; red.global.add.v4.f32 [%rd0], {%r4, %r4, %r4, %r4};", z)
    assert z.tolist() == [32.0] * 4


# ------------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    "address,sectors,ideal",
    [
        ("shl.b32 %r5, %r1, 2;", 4, 4),
        ("shl.b32 %r5, %r1, 3;", 8, 4),
        ("shl.b32 %r5, %r1, 5;", 32, 4),
        ("mov.b32 %r5, 0;", 1, 1),
        ("and.b32 %r5, %r1, 7; shl.b32 %r5, %r5, 2;", 1, 1),
        ("shl.b32 %r5, %r1, 2; add.s32 %r5, %r5, 4;", 5, 4),
    ],
    ids=["contiguous", "stride 2", "stride 8", "one word", "eight words", "across a sector"],
)
def test_sectors_of_a_load(address: str, sectors: int, ideal: int) -> None:
    body = f"{address} cvt.u64.u32 %rd4, %r5; add.s64 %rd4, %rd4, %rd0; ld.global.b32 %r4, [%rd4];"
    stats = run(body, ints(512), grid=(3,))
    assert stats.global_bytes == {"read": 3 * 128}
    assert (stats.sectors["read"], stats.ideal_sectors["read"], stats.accesses["read"]) == (3 * sectors, 3 * ideal, 3)
    assert stats.sectors_over_ideal("read") == sectors / ideal
    assert stats.sectors_per_byte("read") == sectors / 4
    (site,) = stats.sites
    assert (site.opcode, site.space, site.direction, site.bytes) == ("ld.global.b32", "global", "read", 3 * 128)


def test_inactive_threads_ask_for_nothing() -> None:
    stats = run("setp.lt.u32 %p1, %r1, 5; @%p1 ld.global.b32 %r4, [%rd0]; @!%p1 st.global.b8 [%rd0], 0;", ints(8))
    assert stats.global_bytes == {"read": 20, "written": 27}
    assert stats.sectors == stats.ideal_sectors == {"read": 1, "written": 1}


def test_counts_without_a_profile_are_bytes_and_instructions() -> None:
    stats = run(COPY, ints(32), ints(32), profile=False)
    assert stats.global_bytes == {"read": 128, "written": 128} and not any(stats.sectors.values())
    assert stats.opcodes["ld.global.b32"] == stats.opcodes["ret"] == 1


def test_instructions_count_warps() -> None:
    stats = run("setp.lt.u32 %p1, %r1, 32; @%p1 bra $x; mov.b32 %r4, 1; $x:", grid=(5,), warps=4)
    assert (stats.opcodes["bra"], stats.opcodes["mov.b32"], stats.ctas) == (20, 15, 5)
    assert stats.instructions == sum(stats.opcodes.values())
    assert stats.instructions_per_matrix_instruction == float("inf") and stats.matrix_instructions == 0


# ---------------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    "args,options,message",
    [
        ([1], {"races": "perhaps"}, "races: expected 'raise', 'report' or 'off', got 'perhaps'"),
        ([1], {"grid": (1, 1, 1, 1)}, "grid: expected one to three counts"),
        ([ints(1).to("meta")], {}, "only CPU tensors can be mapped, got one on meta"),
    ],
)
def test_wrong_arguments(args: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("", *args, **options)


def test_messages_name_arguments_as_the_caller_does() -> None:
    with pytest.raises(OutOfBounds, match="past the end of weight int32"):
        run("ld.global.b32 %r4, [%rd1+256];", ints(64), ints(64), names=["x", "weight"])


def test_arguments_of_the_wrong_kind_or_number() -> None:
    with pytest.raises(TypeError, match="n is a u32, got a tensor"):
        run("", 0, 0, 0, ints(1))
    with pytest.raises(ValueError, match="takes 6 parameters"):
        run("", *[0] * 8)
    with pytest.raises(PTXSyntaxError, match="exactly one .entry, found 0"):
        emulate(".version 8.7", (1,), 1, [])
