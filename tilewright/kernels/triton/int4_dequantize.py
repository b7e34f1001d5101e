"""A kernel that dequantises a canonical int4 weight for a library's product.

    w[n, k] = dtype((u[n, k] - z[n, g]) * s[n, g]),    g = k // group_size

read from the canonical weight of ``formats.int4``, so any group size will do: weight_packed int32 [N, ceil(K / 8)],
weight_scale [N, G], weight_zero int32 [ceil(N / 8), G] or None; w [rows, 8 * ceil(K / 8)] fp16, bf16 or fp32, whose
padding is left out of the product. A thread turns a word into eight neighbouring weights, 16 bytes of fp16. The
product (u - z) * s is float32 and rounded once, so w equals the reference's to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tilewright.aot.launch import Launch
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.matrices import row_blocks


@dataclass(frozen=True)
class DequantizeConfig:
    """rows and words of a program's block of the weight."""

    rows: int
    words: int
    num_warps: int

    @classmethod
    def for_problem(cls, problem: Problem) -> DequantizeConfig:
        """One size: the kernel is bound by the bytes it writes, in long pieces of few rows. On an H200 13 % faster than
        blocks of 8 x 64 words.
        """
        return cls(rows=4, words=128, num_warps=2)


@triton.jit
def _scale_and_zero(scale_ptr, zero_ptr, row, group, groups, mask):
    """float32 (s, 2^23 + z) for canonical row and group indices that broadcast against each other."""
    wide_row = row.to(tl.int64)
    scale = tl.load(scale_ptr + wide_row * groups + group, mask=mask, other=0.0).to(tl.float32)
    zero = tl.full(scale.shape, 8, tl.int32)
    if zero_ptr is not None:
        words = tl.load(zero_ptr + wide_row // 8 * groups + group, mask=mask, other=0)
        zero = (words >> (row % 8 * 4)) & 15
    return scale, 8388608.0 + zero.to(tl.float32)


@triton.jit
def dequantize_kernel(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    first_row,
    rows,
    words,
    groups,
    group_size,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    WORD_IN_GROUP: tl.constexpr,
):
    """WORD_IN_GROUP: the eight columns of a word share a group."""
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    row = first_row + local
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)[None, :]
    mask = (local < rows) & (word < words)
    packed = tl.load(packed_ptr + row.to(tl.int64) * words + word, mask=mask, other=0)
    nibble = tl.arange(0, 8)[None, None, :]
    # 2^23 + u, whose last place is one: a subtraction turns it into u - z without a conversion.
    shifted = (((packed[:, :, None] >> (nibble * 4)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
    if WORD_IN_GROUP:
        scale, zero = _scale_and_zero(scale_ptr, zero_ptr, row, word * 8 // group_size, groups, mask)
        value = (shifted - zero[:, :, None]) * scale[:, :, None]
    else:
        group = (word[:, :, None] * 8 + nibble) // group_size
        # Columns that pad the last word may lie past the last group.
        inside = mask[:, :, None] & (group < groups)
        scale, zero = _scale_and_zero(scale_ptr, zero_ptr, row[:, :, None], group, groups, inside)
        value = (shifted - zero) * scale
    column = word[:, :, None] * 8 + nibble
    target = out_ptr + local[:, :, None].to(tl.int64) * words * 8 + column
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])


def plan_dequantize(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    out: torch.Tensor,
    *,
    first_row: int,
    group_size: int,
    config: DequantizeConfig,
) -> list[Launch]:
    """The launch that fills ``out`` [rows, 8 * ceil(K / 8)] with the rows from ``first_row`` on.

    All tensors are contiguous.
    """
    rows, words = len(out), weight_packed.shape[1]
    groups = weight_scale.shape[1]
    args = {
        "packed_ptr": weight_packed,
        "scale_ptr": weight_scale,
        "zero_ptr": weight_zero,
        "out_ptr": out,
        "first_row": first_row,
        "rows": rows,
        "words": words,
        "groups": groups,
        "group_size": group_size,
    }
    constants = {"ROWS": config.rows, "WORDS": config.words, "WORD_IN_GROUP": groups == 1 or group_size % 8 == 0}
    grid = (triton.cdiv(words, config.words), triton.cdiv(rows, config.rows))
    return [Launch(dequantize_kernel, grid, args, constants, num_warps=config.num_warps)]


def dequantized_blocks(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    k: int,
    dtype: torch.dtype,
    group_size: int,
    config: DequantizeConfig,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, those rows in ``dtype`` [rows, K]) for each block of the weight that is dequantised at once."""
    packed, scale = weight_packed.contiguous(), weight_scale.contiguous()
    zero = None if weight_zero is None else weight_zero.contiguous()
    for first, last in row_blocks(len(packed), k, dtype):
        scratch = torch.empty(last - first, 8 * packed.shape[1], dtype=dtype, device=packed.device)
        for launch in plan_dequantize(
            packed, scale, zero, scratch, first_row=first, group_size=group_size, config=config
        ):
            launch.run()
        yield first, scratch[:, :k]
