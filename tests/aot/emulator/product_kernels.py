"""Triton kernels around matrix instructions that the emulator's tests compile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemm(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    sxm,
    sxk,
    swk,
    swn,
    sym,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    pid = tl.program_id(0)
    npn = tl.cdiv(N, BN)
    rm = pid // npn * BM + tl.arange(0, BM)
    rn = pid % npn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(tl.cdiv(K, BK)):
        kk = k * BK + rk
        x = tl.load(x_ptr + rm[:, None] * sxm + kk[None, :] * sxk, mask=(rm[:, None] < M) & (kk[None, :] < K), other=0)
        w = tl.load(w_ptr + kk[:, None] * swk + rn[None, :] * swn, mask=(kk[:, None] < K) & (rn[None, :] < N), other=0)
        acc = tl.dot(x, w, acc, out_dtype=ACC)
    tl.store(
        y_ptr + rm[:, None] * sym + rn[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def gemm_contiguous(
    x_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    sxm,
    swn,
    sym,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    TRANS: tl.constexpr,
    AS: tl.constexpr,
):
    """Unit inner strides, so that loads are 16-byte asynchronous copies. w is [N, K]; TRANS loads [BN, BK] and
    transposes.

    AS: the type of operands passed as bytes.
    """
    pid = tl.program_id(0)
    npn = tl.cdiv(N, BN)
    rm = pid // npn * BM + tl.arange(0, BM)
    rn = pid % npn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(tl.cdiv(K, BK)):
        kk = k * BK + rk
        x = tl.load(x_ptr + rm[:, None] * sxm + kk[None, :], mask=(rm[:, None] < M) & (kk[None, :] < K), other=0)
        if TRANS:
            w = tl.load(
                w_ptr + rn[:, None] * swn + kk[None, :], mask=(rn[:, None] < N) & (kk[None, :] < K), other=0
            ).trans()
        else:
            w = tl.load(w_ptr + kk[:, None] * swn + rn[None, :], mask=(kk[:, None] < K) & (rn[None, :] < N), other=0)
        if AS is not None:
            x, w = x.to(AS, bitcast=True), w.to(AS, bitcast=True)
        acc = tl.dot(x, w, acc, out_dtype=ACC)
    tl.store(
        y_ptr + rm[:, None] * sym + rn[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def gemm_tma(x_ptr, w_ptr, y_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STORE: tl.constexpr):
    """x [M, K], w [N, K] through tensor descriptors made on the device."""
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BM, BK])
    w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BN, BK])
    pm, pn = tl.program_id(0), tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(x_desc.load([pm * BM, k]), w_desc.load([pn * BN, k]).T, acc)
    y = acc.to(tl.float16)
    if STORE:
        y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BM, BN])
        y_desc.store([pm * BM, pn * BN], y)
    else:
        rm, rn = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        tl.store(y_ptr + rm[:, None] * N + rn[None, :], y, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def w4a16(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    y_ptr,
    M,
    N,
    K,
    sxm,
    sym,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    G: tl.constexpr,
):
    """Eight nibbles along K in an int32 of w [K / 8, N]; scale and zero point [K / G, N]."""
    pid = tl.program_id(0)
    npn = tl.cdiv(N, BN)
    rm = pid // npn * BM + tl.arange(0, BM)
    rn = pid % npn * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.cdiv(K, BK)):
        x = tl.load(x_ptr + rm[:, None] * sxm + (k * BK + rk)[None, :], mask=rm[:, None] < M, other=0.0)
        w = tl.load(w_ptr + (k * BK + rk)[:, None] // 8 * N + rn[None, :])
        q = (w >> ((rk % 8) * 4)[:, None]) & 0xF
        g = k * BK // G
        s = tl.load(s_ptr + g * N + rn)[None, :]
        z = tl.load(z_ptr + g * N + rn)[None, :]
        acc = tl.dot(x, (q.to(tl.float16) - z) * s, acc)
    tl.store(y_ptr + rm[:, None] * sym + rn[None, :], acc.to(tl.float16), mask=rm[:, None] < M)


@triton.jit
def sparse_mma(a_ptr, m_ptr, b_ptr, y_ptr, KT, BT: tl.constexpr):
    """mma.sp on operands stored in fragment order: four registers a thread, [tiles, BT, 4] int32."""
    pid = tl.program_id(0)
    t = tl.arange(0, BT)
    v = tl.arange(0, 4)
    acc = tl.zeros((BT, 4), tl.float32)
    for k in range(KT):
        a = tl.load(a_ptr + ((pid * KT + k) * BT + t)[:, None] * 4 + v[None, :])
        b = tl.load(b_ptr + (k * BT + t)[:, None] * 4 + v[None, :])
        m = tl.load(m_ptr + (pid * KT + k) * BT + t)[:, None]
        acc = tl.inline_asm_elementwise(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, "
            "{$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, 0x0;",
            "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
            [a, b, tl.broadcast_to(m, (BT, 4)), acc],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    tl.store(y_ptr + (pid * BT + t)[:, None] * 4 + v[None, :], acc)


@triton.jit
def sparse_mma_int8(a_ptr, m_ptr, b_ptr, y_ptr, KT, BT: tl.constexpr):
    """The int8 form: m16n8k64 with int32 accumulators."""
    pid = tl.program_id(0)
    t = tl.arange(0, BT)
    v = tl.arange(0, 4)
    acc = tl.zeros((BT, 4), tl.int32)
    for k in range(KT):
        a = tl.load(a_ptr + ((pid * KT + k) * BT + t)[:, None] * 4 + v[None, :])
        b = tl.load(b_ptr + (k * BT + t)[:, None] * 4 + v[None, :])
        m = tl.load(m_ptr + (pid * KT + k) * BT + t)[:, None]
        acc = tl.inline_asm_elementwise(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, "
            "{$8,$9,$10,$11}, {$16,$17,$18,$19}, $12, 0x0;",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [a, b, tl.broadcast_to(m, (BT, 4)), acc],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        )
    tl.store(y_ptr + (pid * BT + t)[:, None] * 4 + v[None, :], acc)
