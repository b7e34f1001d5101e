"""Small Triton kernels that the emulator's tests compile, and the compiling itself, which needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra import libdevice

TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
}


def compile_ptx(
    fn: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    arch: int = 80,
    aligned: Iterable[str] = (),
    pointers_aligned: bool = True,
    **options: int,
) -> tuple[str, int]:
    """(PTX, bytes of shared memory). ``signature`` maps runtime arguments to types.

    aligned: names of integer arguments that are multiples of 16. pointers_aligned: all pointers are too.
    """
    names = list(signature)
    aligned = set(aligned)
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") and pointers_aligned) or name in aligned
    }
    source = ASTSource(
        fn=fn, signature=dict(signature, **dict.fromkeys(constants, "constexpr")), constexprs=constants, attrs=attrs
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared


@triton.jit
def add(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if MASK:
        tl.store(z_ptr + i, tl.load(x_ptr + i, mask=i < n) + tl.load(y_ptr + i, mask=i < n), mask=i < n)
    else:
        tl.store(z_ptr + i, i)


@triton.jit
def softmax(x_ptr, y_ptr, n, stride, B: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, B)
    x = tl.load(x_ptr + row * stride + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * stride + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def norm(x_ptr, y_ptr, n, stride, R: tl.constexpr, B: tl.constexpr):
    """Rows normalised over a loop of column blocks: 2-D reductions over both axes' threads."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    total = tl.zeros((R,), tl.float32)
    square = tl.zeros((R,), tl.float32)
    for k in range(0, n, B):
        i = k + tl.arange(0, B)
        x = tl.load(x_ptr + row[:, None] * stride + i[None, :], mask=i[None, :] < n, other=0.0).to(tl.float32)
        total += tl.sum(x, 1)
        square += tl.sum(x * x, 1)
    mean = total / n
    scale = tl.rsqrt(square / n - mean * mean + 1e-5)
    for k in range(0, n, B):
        i = k + tl.arange(0, B)
        x = tl.load(x_ptr + row[:, None] * stride + i[None, :], mask=i[None, :] < n, other=0.0).to(tl.float32)
        tl.store(y_ptr + row[:, None] * stride + i[None, :], (x - mean[:, None]) * scale[:, None], mask=i[None, :] < n)


@triton.jit
def split_k(x_ptr, w_ptr, y_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr):
    """x [M, K], w [K, N] fp16; y [M, N] fp32 is added to atomically by S programs for each tile."""
    pid, part = tl.program_id(0), tl.program_id(1)
    npn = tl.cdiv(N, BN)
    rm = pid // npn * BM + tl.arange(0, BM)
    rn = pid % npn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(part, tl.cdiv(K, BK), S):
        kk = k * BK + rk
        x = tl.load(x_ptr + rm[:, None] * K + kk[None, :], mask=(rm[:, None] < M) & (kk[None, :] < K), other=0.0)
        w = tl.load(w_ptr + kk[:, None] * N + rn[None, :], mask=(kk[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(x, w, acc)
    tl.atomic_add(y_ptr + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, o_ptr, N, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr
):
    """Flash attention of one head, [N, D]: the second dot takes its left operand from registers."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    q = tl.load(q_ptr + rm[:, None] * D + rd[None, :], mask=rm[:, None] < N, other=0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BM, N) if CAUSAL else N
    for start in range(0, end, BN):
        rn = start + tl.arange(0, BN)
        k = tl.load(k_ptr + rn[None, :] * D + rd[:, None], mask=rn[None, :] < N, other=0.0)
        keep = rn[None, :] < N
        if CAUSAL:
            keep = keep & (rn[None, :] <= rm[:, None])
        score = tl.where(keep, tl.dot(q, k) * scale, -float("inf"))
        new = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + rn[:, None] * D + rd[None, :], mask=rn[:, None] < N, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new
    tl.store(o_ptr + rm[:, None] * D + rd[None, :], acc / total[:, None], mask=rm[:, None] < N)


@triton.jit
def conv_relu(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    N,
    C,
    H,
    W,
    K,
    P,
    Q,
    stride,
    pad,
    R: tl.constexpr,
    S: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Implicit GEMM, channels last: x [N, H, W, C], w [K, R, S, C], y [N, P, Q, K]."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    n, pq = rm // (P * Q), rm % (P * Q)
    top, left = pq // Q * stride - pad, pq % Q * stride - pad
    acc = tl.zeros((BM, BN), tl.float32)
    size = C * R * S
    for start in range(0, size, BK):
        rk = start + tl.arange(0, BK)
        c, rs = rk % C, rk // C
        h, w = top[:, None] + (rs // S)[None, :], left[:, None] + (rs % S)[None, :]
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (rm[:, None] < N * P * Q) & (rk[None, :] < size)
        x = tl.load(x_ptr + ((n[:, None] * H + h) * W + w) * C + c[None, :], mask=inside, other=0.0)
        f = tl.load(w_ptr + rn[None, :] * size + rk[:, None], mask=(rn[None, :] < K) & (rk[:, None] < size), other=0.0)
        acc = tl.dot(x, f, acc)
    y = tl.maximum(acc + tl.load(b_ptr + rn, mask=rn < K, other=0.0)[None, :], 0.0)
    tl.store(
        y_ptr + rm[:, None] * K + rn[None, :], y.to(tl.float16), mask=(rm[:, None] < N * P * Q) & (rn[None, :] < K)
    )


@triton.jit
def quantize_rows(x_ptr, q_ptr, s_ptr, n, stride, B: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, B)
    x = tl.load(x_ptr + row * stride + i, mask=i < n, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) / 127.0
    tl.store(q_ptr + row * stride + i, libdevice.rint(x / scale).to(tl.int8), mask=i < n)
    tl.store(s_ptr + row, scale)


@triton.jit
def sort_scan(x_ptr, y_ptr, z_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.sort(x))
    tl.store(z_ptr + i, tl.cumsum(x))


@triton.jit
def library(x_ptr, y_ptr, B: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i)
    if OP == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif OP == "sin":
        y = tl.sin(x)
    elif OP == "tanh":
        y = libdevice.tanh(x)
    elif OP == "log":
        y = tl.log(tl.abs(x) + 0.5)
    elif OP == "pow":
        y = libdevice.pow(tl.abs(x), 1.7)
    elif OP == "e5m2":
        y = x.to(tl.float8e5).to(tl.float32)
    elif OP == "clamp":
        y = tl.clamp(x, -0.5, 0.5)
    tl.store(y_ptr + i, y)


@triton.jit
def collatz(x_ptr, y_ptr, B: tl.constexpr):
    """Data-dependent loops: neighbouring programs of a batch take different paths."""
    i = tl.program_id(0)
    x = tl.load(x_ptr + i)
    steps = 0
    while x != 1:
        if x % 2 == 0:
            x = x // 2
        else:
            x = 3 * x + 1
        steps += 1
    tl.store(y_ptr + i, steps)


@triton.jit
def counters(x_ptr, count_ptr, top_ptr, sum_ptr, ticket_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(count_ptr + x, 1, mask=i < n)
    tl.atomic_max(top_ptr + i * 0, x, mask=i < n)
    tl.atomic_add(sum_ptr + i % 8, x.to(tl.float16), mask=i < n)
    tl.atomic_cas(ticket_ptr, tl.program_id(0), tl.program_id(0) + 1)
