"""Shared memory: its checks, its banks, matrix loads and asynchronous copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.aot.emulator.programs import shared_run, two_warps
from tilewright.aot.emulator import (
    AsyncHazard,
    Misaligned,
    OutOfBounds,
    PTXError,
    RaceError,
    UninitializedRead,
    Unsupported,
    emulate,
)
from tilewright.aot.emulator.shared_memory import SharedMemory

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


ATOMIC = "red.shared.add.u32 [%r12], 5;"
START = "@%p1 st.shared.b32 [%r12], 0; bar.sync 0;"


def test_atomics_of_two_warps_are_no_race() -> None:
    out, _ = shared_run(f"{START} {ATOMIC} {ATOMIC} bar.sync 0; ld.shared.b32 %r4, [%r12];")
    assert (out == 20).all()


@pytest.mark.parametrize(
    "body",
    [
        f"{START} {ATOMIC} {{}} ld.shared.b32 %r4, [%r12];",
        f"{START} @%p1 ld.shared.b32 %r4, [%r12]; {{}} @!%p1 {ATOMIC}",
        f"{START} @%p1 st.shared.b32 [%r12], 3; {{}} @!%p1 {ATOMIC}",
    ],
    ids=["atomic then read", "read then atomic", "write then atomic"],
)
def test_atomics_and_ordinary_accesses_need_a_barrier(body: str) -> None:
    shared_run(body.format("bar.sync 0;"))
    with pytest.raises(RaceError):
        shared_run(body.format(""))


def test_atomics_on_one_address_add_up_and_return_what_was_before() -> None:
    out, _ = shared_run("@%p1 st.shared.b32 [%r12], 0; bar.sync 0; atom.shared.add.u32 %r4, [%r11], 1;")
    assert sorted(out.tolist()) == list(range(64))


def test_lanes_of_one_instruction_that_disagree_are_a_race() -> None:
    with pytest.raises(RaceError, match="lanes of one instruction"):
        shared_run("@%p1 st.shared.b32 [%r11], %r8;")


def test_barriers_of_a_whole_cta_may_have_any_number() -> None:
    shared_run(READ_AFTER_WRITE.format("bar.sync 1;"))
    shared_run(READ_AFTER_WRITE.format("barrier.cta.sync.aligned 2, 64;"))
    with pytest.raises(Unsupported, match="part of a CTA"):
        shared_run(READ_AFTER_WRITE.format("bar.sync 1, 32;"))


def test_a_fence_covers_its_own_warp_and_what_a_barrier_ordered() -> None:
    def stored() -> SharedMemory:
        memory = SharedMemory(1, 1024, proxies=True)
        offset = np.array([0, 4])
        memory.store(offset, np.ones((2, 4), np.uint8), np.array([0, 1]))
        return memory

    memory = stored()
    memory.fence_proxy([(0, 0)])
    memory.barrier()
    assert (memory.load_async(np.array([0]), 4) == 1).all()
    with pytest.raises(AsyncHazard, match="fence.proxy.async"):
        memory.load_async(np.array([4]), 4)
    memory = stored()
    memory.barrier()
    memory.fence_proxy([(0, 0)])
    assert (memory.load_async(np.array([4]), 4) == 1).all()


ONE_COPY = """shl.b32 %r13, %r8, 4; add.s32 %r14, %r11, %r13; ld.param.b64 %rd3, [po]; mov.b32 %r15, 7;
st.global.b32 [%rd1], %r15; setp.gt.u32 %p2, %r8, 3; @!%p1 bra $x; {}
cp.async.wait_all; ld.shared.b32 %r4, [%r14]; $x:"""


def test_async_copies_that_ignore_their_source_fill_with_zeros() -> None:
    out, _ = shared_run(ONE_COPY.format("cp.async.cg.shared.global [%r14], [%rd3], 16, %p2;"))
    assert out[:32].tolist() == [7] * 4 + [0] * 28


def test_async_copies_of_nothing_touch_no_global_memory() -> None:
    body = "mov.b32 %r16, 0; mov.b64 %rd3, 0; cp.async.cg.shared.global [%r14], [%rd3], 16, %r16;"
    out, stats = shared_run(ONE_COPY.format(body))
    assert (out[:32] == 0).all() and stats.global_bytes["read"] == 0 and stats.sectors["read"] == 0


@pytest.mark.parametrize(
    "body,error,message",
    [
        ("cp.async.cg.shared.global [%r14], [%rd3+4], 16, 8;", Misaligned, "not aligned to 16 bytes"),
        ("cp.async.cg.shared.global [%r14], [%rd3], 16, 20;", PTXError, "source size 20 exceeds"),
        ("cp.async.cg.shared.global [%r14], [%rd3], 8;", Unsupported, "of 8 bytes"),
        ("cp.async.ca.shared.global [%r14+8], [%rd3], 16;", Misaligned, "shared address"),
        ("cp.async.ca.shared.global [%r14], [%rd3+256], 4;", OutOfBounds, "past the end of po"),
    ],
)
def test_wrong_async_copies(body: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shared_run(ONE_COPY.format(body))


MBARRIER = """mbarrier.init.shared::cta.b64 [%r11], 2; {} mbarrier.arrive.shared::cta.b64 _, [%r11];
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r11], {}; selp.b32 %r4, 1, 0, %p3;"""


def one_thread(body: str) -> int:
    return int(shared_run(f"setp.ne.u32 %p2, %r8, 0; @%p2 bra $x; {body} $x:", arch=90)[0][0])


def test_phases_of_an_mbarrier() -> None:
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r11];"
    assert one_thread(MBARRIER.format("", 0)) == 0  # one of two arrived: phase 0 goes on
    assert one_thread(MBARRIER.format("", 1)) == 1  # the phase before the first counts as complete
    assert one_thread(MBARRIER.format(arrive, 0)) == 1
    assert one_thread(MBARRIER.format(arrive, 1)) == 0
    assert one_thread(MBARRIER.format("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 16;", 0)) == 0


def test_wrong_mbarriers() -> None:
    with pytest.raises(PTXError, match="not an initialised mbarrier"):
        one_thread("mbarrier.arrive.shared::cta.b64 _, [%r11];")
    with pytest.raises(PTXError, match="more arrivals"):
        one_thread(
            MBARRIER.format("mbarrier.arrive.shared::cta.b64 _, [%r11], 2; " * 1, 0).replace(
                "b64 [%r11], 2", "b64 [%r11], 1"
            )
        )


@pytest.mark.parametrize("trans", ["", ".trans"], ids=["plain", "transposed"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_stmatrix_undoes_ldmatrix(number: int, trans: str) -> None:
    names = ", ".join(f"%r{13 + i}" for i in range(number))
    body = "".join(f"mul.lo.s32 %r{13 + i}, %r8, {i + 3}; " for i in range(number))
    body += f"""shl.b32 %r17, %r9, 4; add.s32 %r17, %r11, %r17; @!%p1 bra $x;
    stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%r17], {{{names}}};
    """
    body += "".join(f"mov.b32 %r{13 + i}, 0; " for i in range(number))
    body += (
        f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{names}}}, [%r17]; mov.b32 %r4, %r{12 + number}; $x:"
    )
    assert shared_run(body, arch=90)[0][:32].tolist() == [i * (number + 2) for i in range(32)]
