"""Compiled matrix products of every kind of operand on sm_80 and sm_90."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

import triton.language as tl

from tests.aot.emulator import product_kernels
from tests.aot.emulator.kernels import compile_ptx
from tests.aot.emulator.products import check_product, rand, run_gemm, run_tma, run_w4a16, tiles
from tilewright.aot.emulator import emulate

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("trans", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(100, 96, 144), (64, 64, 256)])
def test_gemm(dtype: torch.dtype, shape: tuple[int, int, int], trans: bool, arch: int) -> None:
    m, n, k = shape
    x, w = rand(m, k, dtype=dtype), rand(n, k, dtype=dtype)
    y, stats = run_gemm(x, w if trans else w.T.contiguous(), dtype, arch, trans)
    check_product(y, x, w.T)
    assert stats.matrix_instructions > 0 and any("wgmma.mma" in op for op in stats.opcodes) == (arch == 90)


@pytest.mark.parametrize("arch", [80, 90])
def test_gemm_ragged_scalar_loads(arch: int) -> None:
    """Strides that are no multiple of anything: no asynchronous copies, byte-sized guards."""
    m, n, k = 37, 45, 71
    x, w, y = rand(m, k), rand(k, n), torch.zeros(m, n, dtype=torch.float32)
    sig = {
        "x_ptr": "*fp16",
        "w_ptr": "*fp16",
        "y_ptr": "*fp32",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "sxm": "i32",
        "sxk": "i32",
        "swk": "i32",
        "swn": "i32",
        "sym": "i32",
    }
    ptx, shared = compile_ptx(
        product_kernels.gemm, sig, {"BM": 32, "BN": 32, "BK": 32, "ACC": tl.float32}, arch, num_warps=4, num_stages=3
    )
    emulate(ptx, (tiles(m, n, 32, 32),), 4, [x, w, y, m, n, k, k, 1, n, 1, n], arch=arch, shared=shared)
    check_product(y, x, w)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("trans", [True, False])
def test_gemm_int8(trans: bool, arch: int) -> None:
    x, w = rand(75, 160, dtype=torch.int8), rand(112, 160, dtype=torch.int8)
    y, _ = run_gemm(x, w if trans else w.T.contiguous(), torch.int32, arch, trans, blocks=(64, 64, 64))
    assert torch.equal(y.long(), x.long() @ w.T.long())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("trans", [True, False])
def test_gemm_tf32(trans: bool, arch: int) -> None:
    """Operands cut to tf32: inputs that tf32 holds exactly."""
    x, w = (rand(*shape, dtype=torch.bfloat16).float() for shape in ((70, 96), (64, 96)))
    y, _ = run_gemm(x, w if trans else w.T.contiguous(), torch.float32, arch, trans, blocks=(64, 64, 32))
    check_product(y, x, w.T)


@pytest.mark.parametrize("arch", [80, 90])
def test_gemm_many_warps_deep_pipeline(arch: int) -> None:
    x, w = rand(130, 320), rand(256, 320)
    y, _ = run_gemm(x, w, torch.float16, arch, blocks=(128, 128, 32), num_warps=8, num_stages=4)
    check_product(y, x, w.T)


def test_wgmma_without_accumulation() -> None:
    """With scale-d false every instruction starts afresh: what remains is the last 16 of K."""
    x, w = rand(64, 64), rand(64, 64)

    def edit(ptx: str) -> str:
        out, count = re.subn(r"mov\.pred(\s+%p\d+), -1;", r"mov.pred\1, 0;", ptx)
        assert count
        return out

    y, _ = run_gemm(x, w, torch.float16, 90, edit=edit)
    check_product(y, x[:, 48:], w.T[48:])


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_gemm_float8(dtype: torch.dtype, arch: int) -> None:
    x, w = rand(75, 160, dtype=dtype), rand(112, 160, dtype=dtype)
    y, stats = run_gemm(x, w, torch.float32, arch)
    check_product(y, x, w.T)
    assert stats.matrix.keys() == {"wgmma" if arch == 90 else "mma.sync"}


@pytest.mark.parametrize("store", [False, True], ids=["plain store", "TMA store"])
@pytest.mark.parametrize("block_k", [32, 64])
def test_gemm_tma(block_k: int, store: bool) -> None:
    y, x, w, stats = run_tma(block_k, store)
    check_product(y, x, w)
    assert any("cp.async.bulk.tensor" in op for op in stats.opcodes)


@pytest.mark.parametrize("arch", [80, 90])
def test_w4a16(arch: int) -> None:
    check_product(*run_w4a16(arch))
