"""What a run counts, on kernels whose counts can be said in advance."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tests.aot.emulator.products import rand, run_gemm, run_tma

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("dtype,k", [(torch.float16, 16), (torch.int8, 32)], ids=["float16", "int8"])
def test_mma_is_counted_by_warp(dtype: torch.dtype, k: int) -> None:
    x, w = rand(128, 256, dtype=dtype), rand(64, 256, dtype=dtype)
    _, stats = run_gemm(x, w, torch.int32 if dtype == torch.int8 else dtype, 80)
    assert stats.matrix == {"mma.sync": 128 * 64 * 256 // (16 * 8 * k)}
    assert stats.matrix_flops == 2 * 128 * 64 * 256
    assert stats.instructions_per_matrix_instruction == stats.instructions / stats.matrix_instructions > 1


def test_wgmma_is_counted_by_warp_group() -> None:
    x, w = rand(128, 256), rand(64, 256)
    _, stats = run_gemm(x, w, torch.float16, 90)
    assert stats.matrix == {"wgmma": 2 * 256 // 16}
    assert stats.matrix_flops == 2 * 128 * 64 * 256
    mma = sum(count for opcode, count in stats.opcodes.items() if opcode.startswith("wgmma.mma_async"))
    assert mma == 4 * stats.matrix["wgmma"]
    assert stats.instructions_per_matrix_instruction == stats.instructions / mma


@pytest.mark.parametrize("arch", [80, 90])
def test_a_pipelined_product_reads_each_tile_once_in_whole_sectors(arch: int) -> None:
    x, w = rand(128, 256), rand(64, 256)
    _, stats = run_gemm(x, w, torch.float16, arch)
    copied = [site for site in stats.sites if site.opcode.startswith("cp.async") and site.space == "global"]
    assert sum(site.bytes for site in copied) == 2 * 64 * 256 * 2 + 2 * 64 * 256 * 2  # two CTAs, two tiles each
    assert stats.sectors_over_ideal("read") == stats.sectors_per_byte("read") == 1
    assert all(site.source.startswith("product_kernels.py:") for site in copied)
    assert stats.wavefronts_over_ideal == 1.0 or arch == 80
    assert "CTAs" in str(stats) and stats.seconds > 0


def test_totals_are_sums_over_sites() -> None:
    _, stats = run_gemm(rand(100, 96), rand(96, 96), torch.float16, 80)
    for space, totals in (("global", stats.global_bytes), ("shared", stats.shared_bytes)):
        for direction in ("read", "written"):
            found = [site.bytes for site in stats.sites if (site.space, site.direction) == (space, direction)]
            assert totals[direction] == sum(found) > 0
    assert stats.bank_conflicts == sum(site.wavefronts - site.ideal_wavefronts for site in stats.sites)


@pytest.mark.parametrize("store", [False, True], ids=["plain store", "TMA store"])
def test_bulk_copies_count_the_bytes_inside_the_tensor(store: bool) -> None:
    *_, stats = run_tma(64, store)
    m, n, k = 100, 96, 200
    assert stats.global_bytes["read"] == 2 * (2 * m * k + 2 * n * k)  # two tiles of the other operand each
    assert stats.global_bytes["written"] == 2 * m * n

    def sectors(rows: int) -> int:
        """Of one sweep over a [rows, k] operand in tiles of 64 x 64."""
        return sum(
            len({2 * (row * k + column) // 32 for row in range(first, min(first + 64, rows)) for column in columns})
            for first in range(0, rows, 64)
            for columns in (range(start, min(start + 64, k)) for start in range(0, k, 64))
        )

    assert stats.sectors["read"] == 2 * sectors(m) + 2 * sectors(n)
