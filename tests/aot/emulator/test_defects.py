"""Defects put into compiled kernels on purpose: the emulator must find each."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tests.aot.emulator import kernels
from tests.aot.emulator.kernels import compile_ptx
from tests.aot.emulator.products import drop, rand, run_gemm, run_tma, run_w4a16
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

pytestmark = pytest.mark.aot


def test_missing_mbarrier_wait_is_caught() -> None:
    def edit(ptx: str) -> str:
        out, count = re.subn(r"mbarrier\.try_wait[^;]*;", "setp.eq.s32 complete, 0, 0;", ptx)
        assert count
        return out

    with pytest.raises(AsyncHazard):
        run_tma(64, False, edit)


def test_wrong_number_of_expected_bytes_is_caught() -> None:
    def edit(ptx: str) -> str:
        out, count = re.subn(r"(mbarrier\.arrive\.expect_tx[^;]*), (\d+);", r"\1, 1\2;", ptx)
        assert count
        return out

    with pytest.raises(PTXError, match="an mbarrier that nothing will complete"):
        run_tma(64, False, edit)


def test_a_buffer_reused_under_a_bulk_store_is_caught() -> None:
    """After the store's commit, thread 0 clears the first words of shared memory, where the tile to store lies."""

    def edit(ptx: str, wait: str) -> str:
        out, count = re.subn(
            r"(cp\.async\.bulk\.commit_group;)(.*?)(cp\.async\.bulk\.wait_group\S*\s+0;)",
            rf"\1 {wait} st.shared.b64 [global_smem], 0; \3",
            ptx,
            flags=re.S,
        )
        assert count == 1
        return out

    run_tma(64, True, lambda ptx: edit(ptx, "cp.async.bulk.wait_group.read 0; bar.sync 0;"))
    with pytest.raises(AsyncHazard, match="overwritten while a bulk store may still read it"):
        run_tma(64, True, lambda ptx: edit(ptx, "bar.sync 0;"))


ADD_SIG = {"x_ptr": "*i32", "y_ptr": "*i32", "z_ptr": "*i32", "n": "i32"}


def test_unmasked_store_is_caught() -> None:
    z = torch.zeros(1000, dtype=torch.int32)
    ptx, shared = compile_ptx(kernels.add, ADD_SIG, {"B": 256, "MASK": False}, num_warps=4)
    with pytest.raises(OutOfBounds) as error:
        emulate(ptx, (4,), 4, [z, z, z, 1000], shared=shared)
    message = str(error.value)
    assert (
        "CTA (3, 0, 0)" in message and "thread 116" in message and "st.global" in message and "past the end" in message
    )


def test_overlapping_programs_are_caught() -> None:
    x, z = torch.ones(2048, dtype=torch.int32), torch.zeros(2048, dtype=torch.int32)
    ptx, shared = compile_ptx(kernels.add, ADD_SIG, {"B": 512, "MASK": True}, num_warps=4)
    emulate(ptx, (4,), 4, [x, x, z, 2048], shared=shared, cta_races=True)
    overlapping = re.sub(r"shl\.b32(\s+%r\d+, %r\d+), 9;", r"shl.b32\1, 8;", ptx)  # programs 256 apart instead of 512
    assert overlapping != ptx
    for batch in (1, 4):
        with pytest.raises(RaceError, match="global race"):
            emulate(overlapping, (4,), 4, [x, x, z, 2048], shared=shared, cta_races=True, batch=batch)


def test_alignment_promise_is_checked() -> None:
    x = torch.zeros(1025, dtype=torch.int32)
    ptx, shared = compile_ptx(kernels.add, ADD_SIG, {"B": 512, "MASK": False}, num_warps=4)
    with pytest.raises(Misaligned):
        emulate(ptx, (1,), 4, [x, x, x[1:], 1024], shared=shared)


def test_views_use_their_storage() -> None:
    x = torch.arange(64, dtype=torch.int32)
    z = torch.zeros(300, dtype=torch.int32)
    ptx, shared = compile_ptx(kernels.add, ADD_SIG, {"B": 256, "MASK": True}, num_warps=4)
    emulate(ptx, (1,), 4, [x[16:], x[32:], z[256:], 32], shared=shared)
    assert torch.equal(z[256:288], x[16:48] + x[32:64]) and (z[:256] == 0).all() and (z[288:] == 0).all()
    with pytest.raises(OutOfBounds):
        emulate(ptx, (1,), 4, [x[16:], x[32:], z, 33], shared=shared)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "pattern,errors",
    [
        (r"cp\.async\.wait_group", AsyncHazard),
        (r"bar\.sync", (RaceError, UninitializedRead, AsyncHazard)),
    ],
)
def test_missing_synchronisation_is_caught(pattern: str, errors: Any, arch: int) -> None:
    x, w = rand(64, 256), rand(64, 256)
    with pytest.raises(errors):
        run_gemm(x, w, torch.float16, arch, edit=drop(pattern))


def test_one_stage_too_many_in_flight_is_caught() -> None:
    x, w = rand(64, 512), rand(64, 512)

    def edit(ptx: str) -> str:
        return re.sub(r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}", ptx)

    with pytest.raises(AsyncHazard):
        run_gemm(x, w, torch.float16, 80, edit=edit)


def test_missing_proxy_fence_is_caught() -> None:
    """The dequantised operand of W4A16 is stored by threads and read by wgmma."""
    with pytest.raises(AsyncHazard, match="fence.proxy.async"):
        run_w4a16(90, edit=drop(r"fence\.proxy\.async"))


def test_races_can_be_reported() -> None:
    x, w = rand(64, 256), rand(64, 256)
    _, stats = run_gemm(x, w, torch.float16, 80, edit=drop(r"bar\.sync"), races="report")
    assert stats.races


def test_unknown_opcode_is_named() -> None:
    z = torch.zeros(1024, dtype=torch.int32)
    ptx, shared = compile_ptx(kernels.add, ADD_SIG, {"B": 256, "MASK": False}, num_warps=4)
    with pytest.raises(Unsupported, match="frobnicate.b32"):
        emulate(re.sub(r"\bret;", "frobnicate.b32 %r1, %r1;\nret;", ptx), (1,), 4, [z, z, z, 1000], shared=shared)


def test_missing_wgmma_wait_is_caught() -> None:
    x, w = rand(64, 256), rand(64, 256)
    with pytest.raises(AsyncHazard, match=r"wgmma result touched before its wgmma\.wait_group"):
        run_gemm(x, w, torch.float16, 90, edit=drop(r"wgmma\.wait_group"))
