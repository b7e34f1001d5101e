"""The order in which ``mma.sync`` wants an int4 weight: what a thread needs is one load of 16 bytes.

A warp multiplies a tile of 16 output features with 8 rows of x, 16 columns at a time (m16n8k16). A row of tiles is cut
into units of 64 columns, four such steps:

    words   int32 [tiles, units, 32 lanes, 4 steps]   eight nibbles: the four registers of operand A
    groups  int32 [tiles, G, 8, 2]                    of the rows g and g + 8 of a tile: the bits of a 16-bit scale in
                                                      the upper half, in the lower one those of -(2^p + z)

Lane 4 g + t has columns 16 t to 16 t + 15 of each unit, four to a step, so that what it needs of a row of x is 32
consecutive bytes: the order of columns is free as long as both operands have the same. Register i of A holds two
values of row g + 8 (i % 2), columns 2 (i // 2) and 2 (i // 2) + 1 of the lane's four: they are nibbles i and i + 4 of
the word, which a shift by 4 i and one mask leave in the low mantissa bits of two 16-bit floats.

-(2^p + z) is what turns such a float, 2^p + u, into u - z (``triton.nibbles``), in the dtype that is multiplied in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.formats import int4

TILE_N = 16
TILE_M = 8
UNIT = 64
#: Bits of -2^p, to which a zero point adds its own: the spacing of numbers there is 1.
OFFSET_BITS = {torch.float16: 0xE400, torch.bfloat16: 0xC300}


@dataclass(frozen=True)
class FragmentWeight:
    """A weight [n, k] in fragment order, as above, to be multiplied in ``dtype``; missing rows are padded with zeros.

    group_size: columns of a group, a multiple of 64, or None where one group is the whole row. scale_dtype: of the
    canonical scale.
    """

    words: torch.Tensor
    groups: torch.Tensor
    n: int
    k: int
    group_size: int | None
    scale_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def units(self) -> int:
        """Units along K."""
        return self.words.shape[1]


def why_no_fragments(k: int, group_size: int) -> str | None:
    """Why a weight with rows of ``k`` columns has no fragment order, in words, or None if it has one."""
    if k % UNIT or not k:
        return f"takes rows of a multiple of {UNIT} columns, not of {k}"
    if group_size < k and group_size % UNIT:
        return f"groups of {group_size} columns are neither a multiple of {UNIT} nor the whole row"
    return None


def pack_words(weight_packed: torch.Tensor, k: int) -> torch.Tensor:
    """Canonical int32 [N, K / 8] -> int32 [tiles, units, 32, 4]; K is a multiple of 64."""
    values = F.pad(int4.unpack(weight_packed, k), (0, 0, 0, -len(weight_packed) % TILE_N))
    # Rows (tile, half, g), columns (unit, t, step, pair, which of the pair).
    parts = values.reshape(-1, 2, 8, k // UNIT, 4, 4, 2, 2)
    upper_and_lower_row = parts[:, 0] | parts[:, 1] << 4
    in_bytes = upper_and_lower_row.permute(0, 2, 1, 3, 4, 6, 5)
    return in_bytes.flatten(-2).contiguous().view(torch.int32).reshape(-1, k // UNIT, 32, 4)


def pack_groups(scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A 16-bit scale and zero points uint8, both [N, G] (None: 8 everywhere) -> int32 [tiles, G, 8, 2]."""
    offset = OFFSET_BITS[dtype] | (int4.MIDDLE if zero is None else zero.to(torch.int32))
    both = scale.contiguous().view(torch.int16).to(torch.int32) << 16 | offset
    tiles = F.pad(both, (0, 0, 0, -len(both) % TILE_N)).reshape(-1, 2, 8, both.shape[1])
    return tiles.permute(0, 3, 2, 1).contiguous()


def fragment_order(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> FragmentWeight:
    """The canonical weight of ``formats.int4`` in fragment order, to be multiplied in ``dtype``, float16 or bfloat16.
    Each tensor is repacked once and kept as long as it lives.

    Raises ValueError for other rows and groups than ``why_no_fragments`` allows, and for scales of 32 bits.
    """
    if reason := why_no_fragments(k, group_size):
        raise ValueError(f"no fragment order for this weight: {reason}")
    if weight_scale.dtype not in OFFSET_BITS:
        raise ValueError(f"no fragment order for this weight: takes scales of 16 bits, not {weight_scale.dtype}")

    def groups() -> torch.Tensor:
        zero = None if weight_zero is None else int4.unpack_zero(weight_zero, len(weight_packed))
        return pack_groups(weight_scale, zero, dtype)

    return FragmentWeight(
        packed(weight_packed, f"int4 fragments of rows of {k}", lambda: pack_words(weight_packed, k)),
        packed(weight_scale, f"int4 fragment groups for {dtype}", groups, weight_zero),
        len(weight_packed),
        k,
        group_size if group_size < k else None,
        weight_scale.dtype,
        dtype,
    )
