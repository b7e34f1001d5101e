"""Compiled Triton kernels of many kinds, compared with float64 or exact references in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tests.aot.emulator import kernels
from tests.aot.emulator.kernels import TYPE_NAMES, compile_ptx
from tests.aot.emulator.products import rand, tiles
from tilewright.aot.emulator import emulate

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_vector_add(dtype: torch.dtype) -> None:
    n = 1000
    x, y = (
        torch.randint(-99, 99, (n,), dtype=dtype) if dtype == torch.int32 else rand(n, dtype=dtype) for _ in range(2)
    )
    z = torch.zeros(n, dtype=dtype)
    kind = f"*{TYPE_NAMES[dtype]}"
    ptx, shared = compile_ptx(
        kernels.add, {"x_ptr": kind, "y_ptr": kind, "z_ptr": kind, "n": "i32"}, {"B": 256, "MASK": True}, num_warps=4
    )
    stats = emulate(ptx, (4,), 4, [x, y, z, n], shared=shared)
    assert torch.equal(z, x + y)
    assert stats.global_bytes["read"] == 2 * x.nbytes
    assert stats.global_bytes["written"] == x.nbytes
    assert (
        stats.sectors["read"] == 2 * stats.global_bytes["read"] // 32
    )  # two 4-byte loads 8 bytes apart: half of each sector


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vector_add_16_bit(dtype: torch.dtype) -> None:
    x, y, z = rand(1000, dtype=dtype), rand(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
    kind = f"*{TYPE_NAMES[dtype]}"
    ptx, shared = compile_ptx(
        kernels.add, {"x_ptr": kind, "y_ptr": kind, "z_ptr": kind, "n": "i32"}, {"B": 256, "MASK": True}, num_warps=4
    )
    emulate(ptx, (4,), 4, [x, y, z, 1000], shared=shared)
    assert torch.equal(z, x + y)


def test_vector_add_promised_alignment_coalesces() -> None:
    n = 1008
    x, y, z = rand(n, dtype=torch.float32), rand(n, dtype=torch.float32), torch.zeros(n)
    ptx, shared = compile_ptx(
        kernels.add,
        {"x_ptr": "*fp32", "y_ptr": "*fp32", "z_ptr": "*fp32", "n": "i32"},
        {"B": 512, "MASK": True},
        aligned=["n"],
        num_warps=4,
    )
    stats = emulate(ptx, (2,), 4, [x, y, z, n], shared=shared)
    assert torch.equal(z, x + y)
    assert stats.sectors_per_byte("read") == stats.sectors_per_byte("written") == 1


@pytest.mark.parametrize("n", [37, 512, 781])
def test_softmax(n: int) -> None:
    x = rand(5, 800)
    y = torch.zeros_like(x)
    ptx, shared = compile_ptx(
        kernels.softmax, {"x_ptr": "*fp16", "y_ptr": "*fp16", "n": "i32", "stride": "i32"}, {"B": 1024}, num_warps=4
    )
    emulate(ptx, (5,), 4, [x, y, n, 800], shared=shared)
    reference = torch.softmax(x[:, :n].double(), 1)
    assert (y[:, :n].double() - reference).abs().max() <= 2**-11 * reference.max()
    assert (y[:, n:] == 0).all()


def test_norm_rows() -> None:
    x = rand(16, 300, dtype=torch.float32)
    y = torch.zeros_like(x)
    ptx, shared = compile_ptx(
        kernels.norm, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "stride": "i32"}, {"R": 8, "B": 64}, num_warps=4
    )
    emulate(ptx, (2,), 4, [x, y, 300, 300], shared=shared)
    reference = torch.nn.functional.layer_norm(x.double(), (300,))
    assert (y.double() - reference).abs().max() < 1e-5


@pytest.mark.parametrize("arch", [80, 90])
def test_split_k_atomics(arch: int) -> None:
    m, n, k, parts = 50, 48, 300, 3
    x, w, y = rand(m, k), rand(k, n), torch.zeros(m, n)
    sig = {"x_ptr": "*fp16", "w_ptr": "*fp16", "y_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    ptx, shared = compile_ptx(
        kernels.split_k, sig, {"BM": 32, "BN": 32, "BK": 32, "S": parts}, arch, ["N"], num_warps=4, num_stages=2
    )
    stats = emulate(ptx, (tiles(m, n, 32, 32), parts), 4, [x, w, y, m, n, k], arch=arch, shared=shared)
    assert any(op.startswith(("atom", "red")) for op in stats.opcodes)
    reference = x.double() @ w.double()
    bound = (x.double().abs() @ w.double().abs()) * 2**-22
    assert ((y.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention(dtype: torch.dtype, causal: bool, arch: int) -> None:
    n, d = 150, 64
    q, k, v = (rand(n, d, dtype=dtype) for _ in range(3))
    o = torch.zeros(n, d)
    sig = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{TYPE_NAMES[dtype]}"),
        "o_ptr": "*fp32",
        "N": "i32",
        "scale": "fp32",
    }
    ptx, shared = compile_ptx(
        kernels.attention, sig, {"D": d, "BM": 64, "BN": 32, "CAUSAL": causal}, arch, num_warps=4, num_stages=3
    )
    emulate(ptx, (3,), 4, [q, k, v, o, n, 0.125], arch=arch, shared=shared)
    reference = torch.nn.functional.scaled_dot_product_attention(
        *(t.double()[None] for t in (q, k, v)), is_causal=causal
    )[0]
    weight_ulp = 2**-11 if dtype == torch.float16 else 2**-8  # the weights are rounded to the input type
    assert (o.double() - reference).abs().max() < weight_ulp * v.abs().max().item()


@pytest.mark.parametrize("arch", [80, 90])
def test_conv_relu(arch: int) -> None:
    n, c, h, w, k = 2, 16, 9, 11, 40
    x, f, b = rand(n, h, w, c), (rand(k, 3, 3, c) * 0.1), rand(k)
    p, q = 5, 6
    y = torch.zeros(n, p, q, k, dtype=torch.float16)
    sig = {
        "x_ptr": "*fp16",
        "w_ptr": "*fp16",
        "b_ptr": "*fp16",
        "y_ptr": "*fp16",
        **dict.fromkeys(("N", "C", "H", "W", "K", "P", "Q", "stride", "pad"), "i32"),
    }
    ptx, shared = compile_ptx(
        kernels.conv_relu, sig, {"R": 3, "S": 3, "BM": 32, "BN": 32, "BK": 32}, arch, ["C"], num_warps=4, num_stages=3
    )
    emulate(ptx, (tiles(n * p * q, 1, 32, 1), 2), 4, [x, f, b, y, n, c, h, w, k, p, q, 2, 1], arch=arch, shared=shared)
    reference = torch.nn.functional.conv2d(
        x.double().permute(0, 3, 1, 2), f.double().permute(0, 3, 1, 2), b.double(), 2, 1
    )
    assert (y.double() - reference.relu().permute(0, 2, 3, 1)).abs().max() < 2**-11 * reference.abs().max()


def test_quantize_rows() -> None:
    x = rand(4, 700)
    q, scale = torch.zeros(4, 700, dtype=torch.int8), torch.zeros(4)
    sig = {"x_ptr": "*fp16", "q_ptr": "*i8", "s_ptr": "*fp32", "n": "i32", "stride": "i32"}
    ptx, shared = compile_ptx(kernels.quantize_rows, sig, {"B": 1024}, num_warps=4)
    emulate(ptx, (4,), 4, [x, q, scale, 700, 700], shared=shared)
    expected = x.float().abs().amax(1) / 127
    assert torch.equal(scale, expected) and torch.equal(q, (x.float() / expected[:, None]).round().to(torch.int8))


def test_sort_and_scan() -> None:
    x, y, z = rand(256, dtype=torch.float32), torch.zeros(256), torch.zeros(256)
    ptx, shared = compile_ptx(
        kernels.sort_scan, {"x_ptr": "*fp32", "y_ptr": "*fp32", "z_ptr": "*fp32"}, {"B": 256}, num_warps=4
    )
    emulate(ptx, (1,), 4, [x, y, z], shared=shared)
    assert torch.equal(y, x.sort().values)
    assert (z.double() - x.double().cumsum(0)).abs().max() < 1e-5


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "op,function",
    [
        ("gelu", torch.nn.functional.gelu),
        ("sin", torch.sin),
        ("tanh", torch.tanh),
        ("log", lambda x: (x.abs() + 0.5).log()),
        ("pow", lambda x: x.abs() ** 1.7),
        ("clamp", lambda x: x.clamp(-0.5, 0.5)),
        ("e5m2", lambda x: x.float().to(torch.float8_e5m2).double()),
    ],
)
def test_library_functions(op: str, function: Callable[..., Any], arch: int) -> None:
    x, y = rand(256, dtype=torch.float32) * 3, torch.zeros(256)
    if op == "sin":
        x[:8] = torch.tensor([1e5, -3e6, 1e9, 7e20, 0.0, 1e-30, 105615.0, 2e4])  # the slow path of the range reduction
    ptx, shared = compile_ptx(
        kernels.library, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"B": 256, "OP": op}, arch, num_warps=4
    )
    emulate(ptx, (1,), 4, [x, y], arch=arch, shared=shared)
    reference = function(x.double())
    assert ((y.double() - reference).abs() <= 1e-6 + 1e-6 * reference.abs()).all()


def test_data_dependent_loops() -> None:
    x, y = torch.arange(1, 30, dtype=torch.int32), torch.zeros(29, dtype=torch.int32)
    ptx, shared = compile_ptx(kernels.collatz, {"x_ptr": "*i32", "y_ptr": "*i32"}, {"B": 1}, num_warps=1)
    emulate(ptx, (29,), 1, [x, y], shared=shared)

    def steps(v):
        return 0 if v == 1 else 1 + steps(v // 2 if v % 2 == 0 else 3 * v + 1)

    assert y.tolist() == [steps(v) for v in x.tolist()]


def test_atomics() -> None:
    x = torch.randint(0, 16, (900,), dtype=torch.int32)
    count, top, ticket = (torch.zeros(size, dtype=torch.int32) for size in (16, 1, 1))
    total = torch.zeros(8, dtype=torch.float16)
    sig = {
        "x_ptr": "*i32",
        "count_ptr": "*i32",
        "top_ptr": "*i32",
        "sum_ptr": "*fp16",
        "ticket_ptr": "*i32",
        "n": "i32",
    }
    ptx, shared = compile_ptx(kernels.counters, sig, {"B": 256}, num_warps=4)
    emulate(ptx, (4,), 4, [x, count, top, total, ticket, 900], shared=shared)
    assert torch.equal(count.long(), torch.bincount(x, minlength=16)) and top.item() == x.max() and ticket.item() == 4
    assert torch.equal(total.float(), torch.zeros(8).index_add_(0, torch.arange(900) % 8, x.float()))
