"""Matrix products on the emulator: run one of the kernels on given operands, and check what comes out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl

from tests.aot.emulator import product_kernels
from tests.aot.emulator.kernels import TYPE_NAMES, compile_ptx
from tilewright.aot.emulator import Stats, emulate

Edit = Callable[[str], str]


def rand(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=dtype)
    return torch.randn(*shape, dtype=torch.float32).to(dtype)


def tiles(m: int, n: int, bm: int, bn: int) -> int:
    return -(-m // bm) * -(-n // bn)


GEMM_SIG = {"M": "i32", "N": "i32", "K": "i32", "sxm": "i32", "swn": "i32", "sym": "i32"}


def run_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.dtype,
    arch: int,
    trans: bool = True,
    blocks: tuple[int, int, int] = (64, 64, 64),
    num_warps: int = 4,
    num_stages: int = 3,
    edit: Edit | None = None,
    **options: Any,
) -> tuple[torch.Tensor, Stats]:
    """x [M, K] and w ([N, K] when trans, else [K, N]) -> (y [M, N], stats)."""
    eight_bits = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}.get(x.dtype)
    if eight_bits is not None:
        x, w = x.view(torch.int8), w.view(torch.int8)
    m, k = x.shape
    n = w.shape[0] if trans else w.shape[1]
    y = torch.full((m, n), 77, dtype=out)
    acc = tl.int32 if x.dtype == torch.int8 and eight_bits is None else tl.float32
    aligned = [
        name for name, value in (("K", k), ("N", n), ("sxm", k), ("swn", w.shape[1]), ("sym", n)) if value % 16 == 0
    ]
    ptx, shared = compile_ptx(
        product_kernels.gemm_contiguous,
        {
            "x_ptr": f"*{TYPE_NAMES[x.dtype]}",
            "w_ptr": f"*{TYPE_NAMES[w.dtype]}",
            "y_ptr": f"*{TYPE_NAMES[out]}",
            **GEMM_SIG,
        },
        dict(zip(("BM", "BN", "BK"), blocks, strict=True), ACC=acc, TRANS=trans, AS=eight_bits),
        arch,
        aligned,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if edit:
        ptx = edit(ptx)
    stats = emulate(
        ptx,
        (tiles(m, n, *blocks[:2]),),
        num_warps,
        [x, w, y, m, n, k, k, w.shape[1], n],
        arch=arch,
        shared=shared,
        **options,
    )
    return y, stats


def check_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Within half a unit in the last place of the output type, plus float32 accumulation."""
    reference = x.double() @ w.double()
    bound = x.double().abs() @ w.double().abs() * 2**-23
    half_ulp = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}[y.dtype]
    assert ((y.double() - reference).abs() <= bound + half_ulp * reference.abs() + 2**-24).all()


def drop(pattern: str) -> Edit:
    """An edit that removes the lines that start with a pattern, and fails where there are none."""

    def edit(ptx: str) -> str:
        out, count = re.subn(rf"^\s*{pattern}[^\n]*\n", "\n", ptx, flags=re.M)
        assert count
        return out

    return edit


def run_tma(
    block_k: int, store: bool, edit: Edit | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Stats]:
    """A product through tensor descriptors, on sm_90: (result, its two operands, stats)."""
    m, n, k = 100, 96, 200
    x, w, y = rand(m, k), rand(n, k), torch.zeros(m, n, dtype=torch.float16)
    sig = {"x_ptr": "*fp16", "w_ptr": "*fp16", "y_ptr": "*fp16", "M": "i32", "N": "i32", "K": "i32"}
    ptx, shared = compile_ptx(
        product_kernels.gemm_tma,
        sig,
        {"BM": 64, "BN": 64, "BK": block_k, "STORE": store},
        90,
        ["N"],
        num_warps=4,
        num_stages=3,
    )
    scratch = torch.zeros(4 * 128 * 4, dtype=torch.uint8)  # 128 bytes a descriptor, room for four in each of four CTAs
    stats = emulate(edit(ptx) if edit else ptx, (2, 2), 4, [x, w, y, m, n, k, scratch], arch=90, shared=shared)
    return y, x, w.T, stats


def run_w4a16(arch: int, edit: Edit | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A product with a weight of 4-bit integers in groups: (result, activations, weight dequantised)."""
    m, n, k, group = 21, 128, 256, 128
    rows = 64 if arch == 90 else 32  # wgmma wants 64
    x, q = rand(m, k), torch.randint(0, 16, (k, n))
    s, z = (torch.rand(k // group, n) * 0.1).half(), torch.randint(0, 16, (k // group, n)).half()
    shifted = (q.reshape(k // 8, 8, n) << torch.arange(0, 32, 4)[None, :, None]).sum(1)
    packed = torch.where(shifted >= 2**31, shifted - 2**32, shifted).int()
    y = torch.zeros(m, n, dtype=torch.float16)
    sig = {
        "x_ptr": "*fp16",
        "w_ptr": "*i32",
        "s_ptr": "*fp16",
        "z_ptr": "*fp16",
        "y_ptr": "*fp16",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "sxm": "i32",
        "sym": "i32",
    }
    ptx, shared = compile_ptx(
        product_kernels.w4a16,
        sig,
        {"BM": rows, "BN": 64, "BK": 64, "G": group},
        arch,
        ["N", "K", "sxm", "sym"],
        num_warps=4,
        num_stages=3,
    )
    emulate(
        edit(ptx) if edit else ptx,
        (tiles(m, n, rows, 64),),
        4,
        [x, packed, s, z, y, m, n, k, k, n],
        arch=arch,
        shared=shared,
    )
    dense = ((q.half().reshape(k // group, group, n) - z[:, None]) * s[:, None]).reshape(k, n)
    return y, x, dense
