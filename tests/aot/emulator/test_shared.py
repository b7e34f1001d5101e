"""Shared memory: its checks, its banks, matrix loads and asynchronous copies."""

from __future__ import annotations

import pytest
import torch

from tests.aot.emulator.programs import shared_run, two_warps
from tilewright.aot.emulator import AsyncHazard, OutOfBounds, RaceError, UninitializedRead, emulate

READ_AFTER_WRITE = "@%p1 st.shared.b32 [%r12], %r9; {} @!%p1 ld.shared.b32 %r4, [%r12];"

WRITE_AFTER_READ = (
    "@%p1 st.shared.b32 [%r12], %r9; bar.sync 0; @!%p1 ld.shared.b32 %r4, [%r12]; {} @%p1 st.shared.b32 [%r12], %r8;"
)

WRITE_AFTER_WRITE = "@%p1 st.shared.b32 [%r12], %r9; {} @!%p1 st.shared.b32 [%r12], %r8;"


@pytest.mark.parametrize("body", [READ_AFTER_WRITE, WRITE_AFTER_READ, WRITE_AFTER_WRITE])
def test_races(body: str) -> None:
    shared_run(body.format("bar.sync 0;"))
    with pytest.raises(RaceError):
        shared_run(body.format(""))
    _, stats = shared_run(body.format(""), races="report")
    assert len(stats.races) == 1
    shared_run(body.format(""), races="off")


def test_equal_values_written_by_two_warps_are_no_race() -> None:
    shared_run("st.shared.b32 [%r12], %r9;")


def test_broadcast_read_then_write_needs_a_barrier() -> None:
    body = "@%p1 st.shared.b32 [%r12], %r9; bar.sync 0; ld.shared.b32 %r4, [%r11]; {} @%p1 st.shared.b32 [%r12], %r8;"
    out, _ = shared_run(body.format("bar.sync 0;"))
    assert (out == 0).all()
    with pytest.raises(RaceError, match="several warps"):
        shared_run(body.format(""))


def test_uninitialised_and_out_of_bounds_shared() -> None:
    with pytest.raises(UninitializedRead):
        shared_run("@%p1 st.shared.b32 [%r12], %r9; bar.sync 0; ld.shared.b32 %r4, [%r12+4];")
    with pytest.raises(OutOfBounds, match="thread 63"):
        shared_run("@!%p1 st.shared.b32 [%r12+900], %r9;")


def test_barrier_in_a_divergent_branch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="bar.sync"):
        shared_run("@%p1 bra $x; bar.sync 0; $x:")


@pytest.mark.parametrize("stride,wavefronts", [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)])
def test_bank_conflicts(stride: int, wavefronts: int) -> None:
    body = (
        f"mul.lo.s32 %r13, %r9, {stride}; and.b32 %r13, %r13, 8191; add.s32 %r13, %r11, %r13; st.shared.b32 [%r13], 1;"
    )
    source = two_warps(body).replace("s[1024]", "s[8192]")
    stats = emulate(source, (1,), 2, [torch.zeros(64, dtype=torch.int32)])
    assert stats.wavefronts["written"] == 2 * wavefronts and stats.ideal_wavefronts["written"] == 2


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_ldmatrix(number: int, trans: bool) -> None:
    """Thread t of a warp holds elements 2 (t % 4), + 1 of row t / 4 (of column t / 4 when transposed) of a matrix."""
    registers = ", ".join(f"%r{13 + i}" for i in range(number))
    fill = "".join(
        f"shl.b32 %r13, %r8, 1; add.s32 %r13, %r13, {128 * i}; shl.b32 %r14, %r13, 16; add.s32 %r14, %r14, 65536; "
        f"or.b32 %r14, %r14, %r13; @%p1 st.shared.b32 [%r12+{256 * i}], %r14; shl.b32 %r13, %r8, 1; "
        f"add.s32 %r13, %r13, {128 * i + 64}; shl.b32 %r14, %r13, 16; add.s32 %r14, %r14, 65536; "
        f"or.b32 %r14, %r14, %r13; @%p1 st.shared.b32 [%r12+{256 * i + 128}], %r14;"
        for i in range(2)
    )
    for which in range(number):  # element i of shared memory holds the number i
        body = (
            fill
            + f"""bar.sync 0; shl.b32 %r13, %r9, 4; add.s32 %r17, %r11, %r13;
        ldmatrix.sync.aligned.m8n8.x{number}{".trans" if trans else ""}.shared.b16 {{{registers}}}, [%r17];
        mov.b32 %r4, %r{13 + which};"""
        )
        out, _ = shared_run(body)
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            pair = [(column, row), (column + 1, row)] if trans else [(row, column), (row, column + 1)]
            low, high = (64 * which + 8 * r + c for r, c in pair)
            assert out[lane].item() == high << 16 | low


def test_async_copy_sizes_and_groups() -> None:
    """A short copy is zero-filled; data of the second group may still be missing after wait_group 1."""
    body = """shl.b32 %r13, %r8, 4; add.s32 %r14, %r11, %r13; ld.param.b64 %rd3, [po]; mov.b32 %r16, 8;
    mov.b32 %r15, 7; st.global.b32 [%rd1], %r15; @!%p1 bra $x;
    cp.async.ca.shared.global [%r14], [%rd3], 16, %r16; cp.async.commit_group;
    cp.async.ca.shared.global [%r14+512], [%rd3], 16; cp.async.commit_group;
    cp.async.wait_group {}; ld.shared.b32 %r4, [%r14+{}]; cp.async.wait_all; $x:"""
    assert (shared_run(body.format(1, 4))[0][:32] == 7).all()
    assert (shared_run(body.format(1, 8))[0][:32] == 0).all()
    assert (shared_run(body.format(0, 524))[0][:32] == 7).all()
    with pytest.raises(AsyncHazard):
        shared_run(body.format(1, 524))
