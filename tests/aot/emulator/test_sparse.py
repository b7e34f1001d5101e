"""``mma.sp`` on 2:4 operands in fragment order, and the layout of its metadata."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tests.aot.emulator import product_kernels
from tests.aot.emulator.kernels import TYPE_NAMES, compile_ptx
from tests.aot.emulator.products import check_product, rand
from tilewright.aot.emulator import PTXError, emulate

pytestmark = pytest.mark.aot


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A 2:4 matrix [rows, columns] and its ordered indices [rows, columns / 4, 2]."""
    chosen = torch.rand(rows, columns // 4, 4).argsort(-1)[..., :2].sort(-1).values
    values = rand(rows, columns // 4, 2, dtype=dtype)
    dense = torch.zeros(rows, columns // 4, 4, dtype=dtype).scatter(-1, chosen, values)
    return dense.reshape(rows, columns), values, chosen


def words(elements: torch.Tensor) -> torch.Tensor:
    """Pack the last dimension, elements of one register each, into int32."""
    return elements.contiguous().view(torch.int32).squeeze(-1)


def fragment_order(values: torch.Tensor, chosen: torch.Tensor, e: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Operand A [tiles_m, tiles_k, 32, 4] and metadata [tiles_m, tiles_k, 32] for 16 x k tiles, written from the ISA's
    tables.

    values, chosen: [rows, columns / 4, 2]; e elements a register (2: fp16 k = 32, 4: int8 k = 64).
    """
    rows, chunks = values.shape[:2]
    tm, tk, per = rows // 16, chunks * 4 // k, k // 4
    packed = values.reshape(tm, 16, tk, k // 2).transpose(1, 2)
    index = chosen.reshape(tm, 16, tk, per, 2).transpose(1, 2)
    a = torch.zeros(tm, tk, 32, 4, dtype=torch.int32)
    meta = torch.zeros(tm, tk, 32, dtype=torch.int64)
    nibble = index[..., 0] | index[..., 1] << 2
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            row, column = g + 8 * (register % 2), e * t + 4 * e * (register // 2)
            a[:, :, lane, register] = words(packed[:, :, row, column : column + e])
        if e == 2:  # threads 0 and 1 of a quad: 16 columns of row g (low half) and row g + 8
            if t < 2:
                for half, row in enumerate((g, g + 8)):
                    for c in range(4):
                        meta[:, :, lane] |= nibble[:, :, row, 4 * t + c] << (16 * half + 4 * c)
        else:  # thread t: 32 columns of row g (t even) or g + 8, first or second half of K
            for c in range(8):
                meta[:, :, lane] |= nibble[:, :, g + 8 * (t % 2), 8 * (t // 2) + c] << 4 * c
    return a, torch.where(meta >= 2**31, meta - 2**32, meta).int()


def b_fragments(b: torch.Tensor, e: int, k: int) -> torch.Tensor:
    """Operand B [tiles_k, 32, 4] of a [K, 8] matrix."""
    out = torch.zeros(b.shape[0] // k, 32, 4, dtype=torch.int32)
    blocks = b.reshape(-1, k, 8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            row = e * t + 4 * e * register
            out[:, lane, register] = words(blocks[:, row : row + e, g])
    return out


def c_matrix(y: torch.Tensor) -> torch.Tensor:
    """Accumulators [tiles_m, 32, 4] -> [tiles_m * 16, 8]."""
    out = torch.zeros(y.shape[0], 16, 8, dtype=y.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            out[:, g + 8 * (i // 2), 2 * t + i % 2] = y[:, lane, i]
    return out.reshape(-1, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_fragment_order_agrees_with_torch(dtype: torch.dtype) -> None:
    """torch's own converter gives the metadata its CUTLASS kernels load lane by lane: an independent witness of the
    layout.

    With 16-bit types a register serves two 16-row tiles: threads 0 and 1 of a quad the first, 2 and 3 the second
    (selector 1).
    """
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    rows, e, k = (16, 4, 64) if dtype == torch.int8 else (32, 2, 32)
    _, values, chosen = two_of_four(rows, k, dtype)
    values = torch.where(values == 0, torch.ones_like(values), values)  # the converter must see which two were kept
    dense = torch.zeros(rows, k // 4, 4, dtype=dtype).scatter(-1, chosen, values).reshape(rows, k)
    compressed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(compressed, values.reshape(rows, k // 2))
    theirs = meta.reshape(-1).view(torch.int32)
    _, mine = fragment_order(values, chosen, e, k)
    if dtype != torch.int8:
        second = mine[1, 0].reshape(8, 4).roll(2, 1).reshape(32)
        mine = mine[0] | second
    assert torch.equal(mine.reshape(-1), theirs)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_sparse_mma_in_fragment_order(dtype: torch.dtype, arch: int) -> None:
    """Inline asm with pack=4 hands a thread its own four consecutive registers, and mma.sp gives the dense product."""
    e, k = (2, 32) if dtype == torch.float16 else (4, 64)
    warps, steps, programs = 4, 3, 2
    dense, values, chosen = two_of_four(16 * warps * programs, k * steps, dtype)
    b = rand(k * steps, 8, dtype=dtype)
    a, meta = fragment_order(values, chosen, e, k)  # one warp computes one 16-row tile
    a = a.reshape(programs, warps, steps, 32, 4).transpose(1, 2).contiguous()
    meta = meta.reshape(programs, warps, steps, 32).transpose(1, 2).contiguous()
    shared_b = b_fragments(b, e, k)[:, None].expand(steps, warps, 32, 4).contiguous()
    out = torch.float32 if dtype == torch.float16 else torch.int32
    y = torch.zeros(programs * warps, 32, 4, dtype=out)
    kernel = product_kernels.sparse_mma if dtype == torch.float16 else product_kernels.sparse_mma_int8
    sig = {"a_ptr": "*i32", "m_ptr": "*i32", "b_ptr": "*i32", "y_ptr": f"*{TYPE_NAMES[out]}", "KT": "i32"}
    ptx, shared = compile_ptx(kernel, sig, {"BT": 128}, arch, num_warps=4, num_stages=3)
    assert "shfl" not in ptx and "st.shared" not in ptx
    stats = emulate(ptx, (programs,), 4, [a, meta, shared_b, y, steps], arch=arch, shared=shared)
    assert stats.matrix_instructions == programs * warps * steps
    product = c_matrix(y)
    if dtype == torch.int8:
        assert torch.equal(product.long(), dense.long() @ b.long())
    else:
        check_product(product, dense, b)


def test_invalid_sparsity_metadata_is_caught() -> None:
    _, values, chosen = two_of_four(128, 32, torch.float16)
    a, meta = fragment_order(values, chosen, 2, 32)
    meta[3, 0, 5] ^= 0xF0 ^ (int(meta[3, 0, 5]) & 0xF0)  # chunk 1 of row 1 of the fourth warp's tile: 0b1111
    sig = {"a_ptr": "*i32", "m_ptr": "*i32", "b_ptr": "*i32", "y_ptr": "*fp32", "KT": "i32"}
    ptx, shared = compile_ptx(product_kernels.sparse_mma, sig, {"BT": 128}, num_warps=4)
    b, y = torch.zeros(128, 4, dtype=torch.int32), torch.zeros(4, 32, 4)
    with pytest.raises(PTXError, match="invalid sparsity metadata 0b1111 for row 1, columns 20"):
        emulate(ptx, (1,), 4, [a, meta, b, y, 1], shared=shared)


def test_pack_without_the_alignment_promise_mixes_threads() -> None:
    """Without 16-byte aligned pointers Triton spreads the four registers over threads, and pack=4 packs other
    elements."""
    sig = {"a_ptr": "*i32", "m_ptr": "*i32", "b_ptr": "*i32", "y_ptr": "*fp32", "KT": "i32"}
    ptx, _ = compile_ptx(product_kernels.sparse_mma, sig, {"BT": 128}, pointers_aligned=False, num_warps=4)
    assert "ld.global.v4" not in ptx
