"""The order in which the int4 kernels read a weight: every word once, its four nibbles where four dots want them.

A row is cut into spans of 128 columns, and a span into four quarters of 32. The 32 words of a span, 16 bits each, hold
one column of each quarter, the first quarter in the low nibble:

    word[n, 32 * span + i] = sum_j u[n, 128 * span + 32 * j + i] << 4 * j,    0 <= i < 32, 0 <= j < 4

So a tile of words, loaded once in 16-byte pieces, becomes four weight tiles, each against consecutive columns of x:
nothing is interleaved. Two neighbouring words fill a register, and one mask leaves in it two weights of one quarter,
each in the low mantissa bits of a 16-bit float. A tensor core's fragment of 16-bit words is also that of the 16-bit
floats they become.

    weight int16 [N, 32 * spans]
    scale  int32 [G', N]    the bits of a 16-bit scale in the upper half, the zero point in the lower one; or
           float32 [G', N]  a scale of 32 bits
    zero   int32 [G', N]    beside scales of 32 bits, unless every zero point is 8

Group by group, so that neighbouring rows are neighbours in memory, and four bytes each, because that is the least that
an asynchronous copy takes: what is narrower is loaded when it is needed, and everything waits.

A quarter lies inside one group: groups are multiples of 32 columns, or the whole row. G' counts the groups that the
padded columns reach into. Padding holds zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.formats import int4

QUARTER = 32
SPAN = 4 * QUARTER


def span_count(k: int) -> int:
    """Spans in a row of ``k`` columns, the last one padded."""
    return -(-k // SPAN)


def why_no_spans(k: int, group_size: int) -> str | None:
    """Why a weight with rows of ``k`` columns has no kernel order, in words, or None if it has one."""
    if group_size >= k or group_size % QUARTER == 0:
        return None
    return f"groups of {group_size} columns are neither a multiple of {QUARTER} nor the whole row"


def quarters_per_group(k: int, group_size: int) -> int | None:
    """Length of a group in quarters, or None when one group is the whole row. Raises ValueError for any other group."""
    reason = why_no_spans(k, group_size)
    if reason is not None:
        raise ValueError(f"no kernel order for this weight: {reason}")
    return None if group_size >= k else group_size // QUARTER


def pack_words(weight_packed: torch.Tensor, k: int) -> torch.Tensor:
    """Canonical int32 [N, ceil(K / 8)] -> int16 [N, 32 * spans]."""
    rows, spans = len(weight_packed), span_count(k)
    values = F.pad(int4.unpack(weight_packed, k), (0, spans * SPAN - k)).reshape(rows, spans, 4, QUARTER).unbind(2)
    low, high = (values[0] | values[1] << 4), (values[2] | values[3] << 4)
    return torch.stack((low, high), dim=-1).view(torch.int16).reshape(rows, spans * QUARTER)


def unpack_words(words: torch.Tensor, k: int) -> torch.Tensor:
    """int16 [N, 32 * spans] -> the values u, uint8 [N, K]: undoes ``pack_words``."""
    low, high = words.contiguous().view(torch.uint8).reshape(len(words), span_count(k), QUARTER, 2).unbind(-1)
    quarters = (low & 15, low >> 4, high & 15, high >> 4)
    return torch.stack(quarters, dim=2).reshape(len(words), span_count(k) * SPAN)[:, :k]


def pack_groups(per_group: torch.Tensor, quarters: int | None, k: int) -> torch.Tensor:
    """Scales or zero points [N, G] -> [G', N], always in memory of its own. quarters: of a group, as above."""
    groups = 1 if quarters is None else -(-4 * span_count(k) // quarters)
    padded = F.pad(per_group, (0, max(0, groups - per_group.shape[1])))
    return padded.t().clone(memory_format=torch.contiguous_format)


def scale_words(scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """A 16-bit scale and a zero point, uint8 of the same shape or None for 8, in an int32 word each."""
    bits = scale.contiguous().view(torch.int16).to(torch.int32) << 16
    return bits | (8 if zero is None else zero.to(torch.int32))


@dataclass(frozen=True)
class SpanWeight:
    """A weight [N, K] in kernel order; weight, scale and zero are described at the top of this file.

    quarters_per_group: see the function of that name. scale_dtype: of the canonical scale. symmetric: all zeros are 8.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    quarters_per_group: int | None
    k: int
    scale_dtype: torch.dtype = torch.float32
    symmetric: bool = True


def kernel_order(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    k: int,
) -> SpanWeight:
    """The canonical weight of ``formats.int4`` in kernel order. Each tensor is repacked once and kept as long as it
    lives.

    Raises ValueError for groups that are neither a multiple of 32 nor the whole row.
    """
    quarters = quarters_per_group(k, group_size)
    n, groups = len(weight_packed), f"of rows of {k} in groups of {quarters} quarters"

    def zeros() -> torch.Tensor | None:
        return None if weight_zero is None else pack_groups(int4.unpack_zero(weight_zero, n), quarters, k)

    def scales() -> torch.Tensor:
        scale = pack_groups(weight_scale, quarters, k)
        return scale if scale.dtype == torch.float32 else scale_words(scale, zeros())

    zero = None
    if weight_zero is not None and weight_scale.dtype == torch.float32:
        zero = packed(weight_zero, f"int4 zero points {groups}", lambda: zeros().to(torch.int32))  # type: ignore[union-attr]
    return SpanWeight(
        packed(weight_packed, f"int4 spans of rows of {k}", lambda: pack_words(weight_packed, k)),
        packed(weight_scale, f"int4 scales {weight_scale.dtype} {groups}", scales, weight_zero),
        zero,
        quarters,
        k,
        weight_scale.dtype,
        weight_zero is None,
    )
