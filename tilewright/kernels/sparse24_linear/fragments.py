"""The order in which ``mma.sp`` wants a 2:4 weight: each thread's registers side by side.

A warp multiplies a tile of 16 output features with 8 rows of x, 32 columns (16-bit values, m16n8k32) or 64 (int8,
m16n8k64) at a time. A row of tiles is cut into units of 128 columns: 4 or 2 such steps.

    values  int32 [tiles, units, steps of a unit, 32 lanes, 4]    the four registers of operand A
    meta    int32 [tiles, units, 2, 32 lanes]                     places of two steps (16-bit) or of one (int8)

Of lane 4 g + t, register i of A holds the kept values of row g + 8 (i % 2) from e t + 4 e (i // 2) on, e to a register.
Places of 16-bit values: lanes t = 0, 1 of each four hold those of an even step, t = 2, 3 those of the next, 16 columns
of row g in the low half and of row g + 8 in the high half; the instruction's selector says which pair it reads. int8:
lane t holds 32 columns of row g (t even) or g + 8, the first or second half of the step (PTX ISA, "Matrix fragments
for sparse mma.m16n8k32" and "... k64").

Groups of an int8 step are permuted, 4 t + r to t + 4 r, so that the four registers of x that a lane needs are 16
consecutive bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.formats import sparse24

TILE_N = 16
TILE_M = 8
UNIT = 128


@dataclass(frozen=True)
class FragmentWeight:
    """A weight [n, k] of 16-bit or int8 values in fragment order, as above; rows and columns are padded with zeros."""

    values: torch.Tensor
    meta: torch.Tensor
    n: int
    k: int
    is_int8: bool

    @property
    def units(self) -> int:
        """Units along K."""
        return self.values.shape[1]


def step_columns(is_int8: bool) -> int:
    """Columns that one instruction multiplies."""
    return 64 if is_int8 else 32


def unit_count(k: int) -> int:
    """Units in a row of ``k`` columns, the last one padded."""
    return -(-k // UNIT)


def _tiles(per_group: torch.Tensor, is_int8: bool, k: int, fill: int) -> torch.Tensor:
    """[N, G, 2] -> [tiles, units, steps, 16 rows, groups of a step, 2], padded and, for int8, permuted."""
    groups = unit_count(k) * UNIT // sparse24.GROUP
    padded = F.pad(per_group, (0, 0, 0, groups - per_group.shape[1], 0, -len(per_group) % TILE_N))
    if fill:
        padded[len(per_group) :, :, 1] = fill
        padded[:, per_group.shape[1] :, 1] = fill
    of_step = step_columns(is_int8) // sparse24.GROUP
    steps = UNIT // step_columns(is_int8)
    tiles = padded.reshape(-1, TILE_N, unit_count(k), steps, of_step, 2).permute(0, 2, 3, 1, 4, 5)
    if is_int8:
        order = torch.arange(of_step, device=tiles.device).reshape(4, 4).t().flatten()
        tiles = tiles[..., order, :]
    return tiles


def pack_values(values: torch.Tensor, k: int) -> torch.Tensor:
    """Kept values [N, 2 G], 16-bit floats or int8, -> operand A."""
    is_int8 = values.dtype == torch.int8
    tiles = _tiles(values.reshape(len(values), sparse24.group_count(k), 2), is_int8, k, 0)
    e = 4 if is_int8 else 2
    # [tiles, units, steps, half of the rows, g, half of the values, t, e] -> lanes (g, t), registers (values, rows)
    parts = tiles.reshape(*tiles.shape[:3], 2, 8, 2, 4, e).permute(0, 1, 2, 4, 6, 5, 3, 7)
    return parts.contiguous().view(torch.int32).reshape(*tiles.shape[:3], 32, 4)


def pack_meta(meta: torch.Tensor, k: int, is_int8: bool) -> torch.Tensor:
    """The places of ``formats.sparse24`` -> metadata registers. Padding keeps places 0 and 1, which the instruction
    wants to ascend, of values that are 0.
    """
    tiles = _tiles(sparse24.unpack_places(meta, k), is_int8, k, 1)
    nibble = tiles[..., 0] | tiles[..., 1] << 2  # [tiles, units, steps, 16, groups of a step]
    if is_int8:
        shifts = 4 * torch.arange(8, device=meta.device)
        words = (nibble.reshape(*nibble.shape[:3], 2, 8, 2, 8) << shifts).sum(-1)  # rows (half, g), half of the step
        lanes = words.permute(0, 1, 2, 4, 5, 3)  # g, then t = 2 (half of the step) + (half of the rows)
    else:
        shifts = 4 * torch.arange(4, device=meta.device)
        words = (nibble.reshape(*nibble.shape[:3], 2, 8, 2, 4) << shifts).sum(-1)
        words = words[:, :, :, 0] | words[:, :, :, 1] << 16  # [tiles, units, 4 steps, g, half of the step]
        lanes = words.reshape(*words.shape[:2], 2, 2, 8, 2).permute(0, 1, 2, 4, 3, 5)  # g, then t = 2 (odd step) + half
    registers = lanes.reshape(*lanes.shape[:3], 32)
    return torch.where(registers >= 2**31, registers - 2**32, registers).to(torch.int32)


def fragment_order(
    weight_values: torch.Tensor, weight_meta: torch.Tensor, k: int, dtype: torch.dtype
) -> FragmentWeight:
    """A 2:4 weight in fragment order, its values in a 16-bit ``dtype`` or int8; each tensor is repacked once.

    Raises ValueError for places that do not ascend: what the instruction makes of them is undefined.
    """
    is_int8 = dtype == torch.int8

    def places() -> torch.Tensor:
        if not weight_meta.is_meta and (reason := sparse24.why_bad_meta(weight_meta, k)):
            raise ValueError(f"weight_meta is no 2:4 pattern: {reason}")
        return pack_meta(weight_meta, k, is_int8)

    values = packed(
        weight_values, f"2:4 fragments, {k} columns, {dtype}", lambda: pack_values(weight_values.to(dtype), k)
    )
    return FragmentWeight(
        values,
        packed(weight_meta, f"2:4 fragment metadata, {k} columns, int8 {is_int8}", places),
        len(weight_values),
        k,
        is_int8,
    )
