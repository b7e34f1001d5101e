"""The order in which the kernels that unpack in registers read a 2:4 weight: everything once, nothing interleaved.

A row is cut into blocks of 128 columns, 32 groups of four. The kept values of a block lie apart: first the 32 first
ones, then the 32 second ones. What is kept of group i of several blocks shares a word, a nibble to each block, the
first block in the low nibble; bit c of it says that column 4 i + c is kept.

    float   step of 4 blocks, 512 columns   values [N, steps, 4, 2, 32] 16-bit floats    mask int16 [N, steps, 32]
    int8    step of 2 blocks, 256 columns   values [N, steps, 2, 2, 32] int8             mask int8  [N, steps, 32]
    int4    step of 4 blocks, 512 columns   values [N, steps, 2, 32] int16               mask int16 [N, steps, 32]

An int4 word holds the first and second values of group i of one block, then those of the next. So a tile of words and
tiles of values, loaded once in 16-byte pieces, have element by element what makes four weight tiles, for the columns
4 i + c of one c each (``triton_select``); x is taken apart likewise. Padding keeps nothing: its bits are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.formats import int4, sparse24

#: Columns of a block, and groups of four in it.
BLOCK = 128
GROUPS = BLOCK // sparse24.GROUP
FLOAT, INT8, INT4 = 0, 1, 2


@dataclass(frozen=True)
class StepWeight:
    """A weight [N, K] in kernel order; kind: FLOAT, INT8 or INT4; values and mask as above, flattened to [N, ...].

    scale float [G, N], zero uint8 [G, N] or None: of int4 alone, group by group. blocks_per_group: 0 for one group.
    """

    kind: int
    values: torch.Tensor
    mask: torch.Tensor
    k: int
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    blocks_per_group: int = 0

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return len(self.mask)

    @property
    def steps(self) -> int:
        """Steps along K, the last one padded."""
        return step_count(self.kind, self.k)


def blocks_per_step(kind: int) -> int:
    """Blocks whose masks share a word."""
    return 2 if kind == INT8 else 4


def step_count(kind: int, k: int) -> int:
    """Steps in a row of ``k`` columns."""
    return -(-k // (BLOCK * blocks_per_step(kind)))


def why_no_blocks(k: int, group_size: int) -> str | None:
    """Why int4 values with such groups have no kernel order, or None if they have one."""
    if group_size >= k or group_size % BLOCK == 0:
        return None
    return f"groups of {group_size} columns are neither a multiple of {BLOCK} nor the whole row"


def _blocks(per_group: torch.Tensor, kind: int, k: int) -> torch.Tensor:
    """[N, groups of four, ...] -> [N, steps, blocks of a step, 32, ...], zeros appended."""
    blocks = step_count(kind, k) * blocks_per_step(kind)
    padding = (0, 0) * (per_group.dim() - 2) + (0, blocks * GROUPS - per_group.shape[1])
    padded = F.pad(per_group, padding)
    steps = step_count(kind, k)
    return padded.reshape(len(padded), steps, blocks_per_step(kind), GROUPS, *per_group.shape[2:])


def pack_mask(meta: torch.Tensor, kind: int, k: int) -> torch.Tensor:
    """The places of ``formats.sparse24`` -> mask int16 (int8: int8) [N, steps * 32]."""
    places = sparse24.unpack_places(meta, k)
    bits = (1 << places[..., 0]) | (1 << places[..., 1])
    shifts = 4 * torch.arange(blocks_per_step(kind), device=meta.device).view(1, 1, -1, 1)
    words = (_blocks(bits, kind, k) << shifts).sum(2)
    return words.to(torch.int8 if kind == INT8 else torch.int16).flatten(1)


def pack_values(values: torch.Tensor, kind: int, k: int) -> torch.Tensor:
    """Kept values [N, 2 G] -> [N, steps * blocks * 64] of their dtype."""
    pairs = _blocks(values.reshape(len(values), sparse24.group_count(k), 2), kind, k)
    return pairs.transpose(3, 4).flatten(1).contiguous()


def pack_int4_values(weight_values: torch.Tensor, k: int) -> torch.Tensor:
    """Packed int4 values of the canonical form -> int16 [N, steps * 64]."""
    values = int4.unpack(weight_values, sparse24.kept_count(k)).to(torch.int64)
    pairs = _blocks(values.reshape(len(values), sparse24.group_count(k), 2), INT4, k)
    first, second = pairs[:, :, 0::2], pairs[:, :, 1::2]  # of a word's two blocks: [N, steps, 2, 32, 2]
    words = first[..., 0] | first[..., 1] << 4 | second[..., 0] << 8 | second[..., 1] << 12
    return words.to(torch.int16).flatten(1).contiguous()


def pack_groups(per_group: torch.Tensor, blocks_per_group: int, k: int) -> torch.Tensor:
    """Scales or zero points [N, G] -> [G', N], G' counting the groups that padding reaches into."""
    groups = 1
    if blocks_per_group:
        groups = -(-step_count(INT4, k) * blocks_per_step(INT4) // blocks_per_group)
    padded = F.pad(per_group, (0, max(0, groups - per_group.shape[1])))
    return padded.t().clone(memory_format=torch.contiguous_format)


def _mask(weight_meta: torch.Tensor, kind: int, k: int) -> torch.Tensor:
    return packed(weight_meta, f"2:4 mask of {k} columns, kind {kind}", lambda: pack_mask(weight_meta, kind, k))


def step_order(weight_values: torch.Tensor, weight_meta: torch.Tensor, k: int, dtype: torch.dtype) -> StepWeight:
    """A 2:4 weight in kernel order, its values int8 or floats in a 16-bit ``dtype``; each tensor is repacked once."""
    kind = INT8 if dtype == torch.int8 else FLOAT
    values = packed(
        weight_values, f"2:4 steps, {k} columns, {dtype}", lambda: pack_values(weight_values.to(dtype), kind, k)
    )
    return StepWeight(kind, values, _mask(weight_meta, kind, k), k)


def int4_order(
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    k: int,
) -> StepWeight:
    """A 2:4 weight of int4 values in kernel order. Raises ValueError for groups that have none."""
    if reason := why_no_blocks(k, group_size):
        raise ValueError(f"no kernel order for this weight: {reason}")
    blocks, n = 0 if group_size >= k else group_size // BLOCK, len(weight_values)
    groups = f"of {k} columns in groups of {blocks} blocks"
    zero = None
    if weight_zero is not None:
        zero = packed(
            weight_zero, f"2:4 zero points {groups}", lambda: pack_groups(int4.unpack_zero(weight_zero, n), blocks, k)
        )
    values = packed(weight_values, f"2:4 int4 steps, {k} columns", lambda: pack_int4_values(weight_values, k))
    scale = packed(weight_scale, f"2:4 scales {groups}", lambda: pack_groups(weight_scale, blocks, k))
    return StepWeight(INT4, values, _mask(weight_meta, INT4, k), k, scale, zero, blocks)
