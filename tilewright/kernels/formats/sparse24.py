"""2:4 weights: of every four consecutive columns two are kept (Mishra et al. 2021), with their places beside them.

    weight_values  [N, 2 G]            G = ceil(K / 4): the two kept values of each group of four columns, in order
    weight_meta    uint8 [N, ceil(G / 2)]   for each group the nibble i0 | i1 << 2 of their places, i0 < i1;
                                       the first of two groups in the low nibble

    w[n, 4 g + i0] = weight_values[n, 2 g],  w[n, 4 g + i1] = weight_values[n, 2 g + 1],  0 elsewhere

Values are float, int8, or int4 packed as in ``formats.int4``, whose matrix then is the one of the kept values: a group
of ``group_size`` columns of the weight is one of ``group_size / 2`` kept values. A last group may be short: places past
the end hold 0. The nibble of a group that does not exist is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewright.kernels.formats import int4

GROUP = 4
KEPT = 2
#: The six nibbles that name two different places in order.
VALID = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)


def group_count(k: int) -> int:
    """Groups of four in a row of ``k`` columns, the last one perhaps short."""
    return -(-k // GROUP)


def kept_count(k: int) -> int:
    """Kept values in a row of ``k`` columns."""
    return KEPT * group_count(k)


def meta_count(k: int) -> int:
    """Bytes of places in a row of ``k`` columns."""
    return -(-group_count(k) // 2)


def _grouped(matrix: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """[N, K] as [N, G, 4], a short last group filled up."""
    rows, k = matrix.shape
    return F.pad(matrix, (0, -k % GROUP), value=fill).reshape(rows, group_count(k), GROUP)


def best_mask(scores: torch.Tensor) -> torch.Tensor:
    """The mask, bool [N, K], that keeps the two highest scores of every four columns; of equal ones the first.

    scores: float [N, K], not NaN.
    """
    order = _grouped(scores.detach().float(), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
    kept.scatter_(-1, order[..., :KEPT], True)
    return kept.flatten(1)[:, : scores.shape[1]]


def why_not_24(mask: torch.Tensor) -> str | None:
    """Where a mask, bool [N, K] (or a weight, whose non-zeros are meant), keeps more than two of four, or None."""
    counts = _grouped(mask != 0).sum(-1)
    worst = (counts > KEPT).nonzero()
    if not len(worst):
        return None
    row, group = worst[0].tolist()
    last = min(GROUP * group + GROUP, mask.shape[1]) - 1
    return (
        f"row {row} keeps {int(counts[row, group])} of the columns {GROUP * group} to {last}; "
        f"{len(worst)} of {counts.numel()} groups keep more than {KEPT}"
    )


def check_mask(mask: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless ``mask`` is a bool matrix of the shape of ``weight`` that is 2:4."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a 2:4 mask must be bool, not {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(f"a mask of shape {list(mask.shape)} does not fit a weight of shape {list(weight.shape)}")
    if reason := why_not_24(mask):
        raise ValueError(f"the mask is not 2:4: {reason}")


def pack(weight: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [N, K] of any dtype -> (values [N, 2 G] of that dtype, meta uint8 [N, ceil(G / 2)]).

    mask: bool [N, K], what is kept; the rest counts as 0. Without one it is what is not zero, and it costs no bit.
    Groups that keep fewer than two places are filled up with their first free ones, which hold 0. Raises TypeError or
    ValueError for a weight that is no matrix or on the meta device, and for more than two of four kept.
    """
    if weight.dim() != 2:
        raise ValueError(f"a 2:4 weight must be a matrix [N, K], not of shape {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError("a weight to pack must hold data, but is on the meta device")
    if mask is not None:
        check_mask(mask, weight)
    elif reason := why_not_24(weight):
        raise ValueError(f"the weight is not 2:4: {reason}; prune it first, or give a mask")
    weight = weight.detach()
    kept = _grouped(weight != 0 if mask is None else mask)
    # A stable sort puts the kept places first, both they and the free ones in ascending order.
    places = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :KEPT].sort(dim=-1).values
    grouped = _grouped(weight)
    # Not a product: the weight may hold infinities that the mask drops.
    values = torch.where(kept, grouped, torch.zeros_like(grouped)).gather(-1, places)
    return values.reshape(len(weight), kept_count(weight.shape[1])), pack_places(places)


def pack_places(places: torch.Tensor) -> torch.Tensor:
    """Places int64 [N, G, 2] in 0..3, ascending -> uint8 [N, ceil(G / 2)]."""
    nibbles = F.pad((places[..., 0] | places[..., 1] << 2).to(torch.uint8), (0, places.shape[1] % 2))
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_places(meta: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 [N, ceil(G / 2)] -> places int64 [N, G, 2]."""
    nibbles = torch.stack([meta & 15, meta >> 4], dim=-1).reshape(len(meta), 2 * meta.shape[1])[:, : group_count(k)]
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1).to(torch.int64)


def why_bad_meta(meta: torch.Tensor, k: int) -> str | None:
    """What is wrong with the places of a weight of ``k`` columns, or None: they ascend, and unused nibbles are 0."""
    places = unpack_places(meta, k)
    wrong = (places[..., 0] >= places[..., 1]).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        first, second = places[row, group].tolist()
        return f"row {row} keeps the places {first} and {second} of group {group}, which do not ascend"
    if group_count(k) % 2 and meta.numel() and (meta[:, -1] >> 4).any():
        return "the nibble after the last group is not 0"
    return None


def mask_of(meta: torch.Tensor, k: int) -> torch.Tensor:
    """The places as a mask, bool [N, K]."""
    ones = torch.ones(len(meta), kept_count(k), dtype=torch.bool, device=meta.device)
    return unpack(ones, meta, k)


def unpack(values: torch.Tensor, meta: torch.Tensor, k: int, background: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight [N, K] in the dtype of ``values`` [N, 2 G]; background [N, K]: what is elsewhere, if not 0."""
    places = unpack_places(meta, k)
    rows, groups = len(values), group_count(k)
    dense = values.new_zeros(rows, groups, GROUP) if background is None else _grouped(background).clone()
    dense.scatter_(-1, places, values.reshape(rows, groups, KEPT))
    return dense.reshape(rows, groups * GROUP)[:, :k].contiguous()


def kept_group_size(k: int, group_size: int) -> int:
    """Kept values that share a scale where ``group_size`` columns of ``k`` do. Raises ValueError unless groups of
    columns are made of groups of four.
    """
    if group_size >= k:
        return max(kept_count(k), 1)
    if group_size % GROUP:
        raise ValueError(f"groups of {group_size} columns are neither a multiple of {GROUP} nor the whole row")
    return group_size // KEPT


def unpack_int4(
    weight_values: torch.Tensor, meta: torch.Tensor, weight_zero: torch.Tensor | None, group_size: int, k: int
) -> torch.Tensor:
    """The dense int4 weight, ``weight_packed`` of ``formats.int4``, int32 [N, ceil(K / 8)]; its scales and zero points
    are those of the kept values, so that what is not kept equals its zero point.
    """
    values = int4.unpack(weight_values, kept_count(k))
    shape = (len(values), k)
    if weight_zero is None:
        zero = torch.full(shape, int4.MIDDLE, dtype=torch.uint8, device=values.device)
    else:
        zero = int4.unpack_zero(weight_zero, len(values)).repeat_interleave(group_size, dim=1)[:, :k]
    return int4.pack(unpack(values, meta, k, background=zero))
