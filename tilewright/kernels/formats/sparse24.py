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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.formats import int4
from tilewright.kernels.formats.int4 import Int4
from tilewright.kernels.formats.int8 import Int8, check_weight
from tilewright.kernels.formats.weight import Draw, Float, Operands, Spec, WeightFormat, check_dtype, present

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
    words = meta.to(torch.int32)  # ONNX shifts no bytes as PyTorch does
    nibbles = torch.stack([words & 15, words >> 4], dim=-1).reshape(len(meta), 2 * meta.shape[1])[:, : group_count(k)]
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
    # Not in place: programs are exported through here.
    dense = dense.scatter(-1, places, values.reshape(rows, groups, KEPT))
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


@dataclass(frozen=True)
class Sparse24(WeightFormat):
    """The format of this file, for operators and modules.

    values: the format of the matrix of kept values, ``Float``, ``Int8`` or ``Int4``; its groups are of kept values, see
    ``kept_group_size``. Its first operand is called ``weight_values`` here.
    """

    values: WeightFormat = field(default_factory=Float)

    name = "sparse24"
    NAMES = ("weight_values", "weight_meta", "weight_scale", "weight_zero")

    @staticmethod
    def kind_of(arguments: Mapping[str, Any]) -> type[WeightFormat]:
        """The class of the values' format, which tells by the arguments that an operator has."""
        if "group_size" in arguments:
            return Int4
        return Int8 if "weight_scale" in arguments else Float

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any], k: int) -> Sparse24:
        """The format of the weight among an operator's arguments."""
        kind = cls.kind_of(arguments)
        given = {**arguments, kind.NAMES[0]: arguments["weight_values"]}
        if kind is Int4:
            given["group_size"] = kept_group_size(k, arguments["group_size"])
        return cls(kind.of_arguments(given, kept_count(k)))

    @classmethod
    def check(cls, op: str, arguments: Mapping[str, Any], k: int) -> int:
        """N, if the weight fits activations of ``k`` columns. The places in ``weight_meta`` are not looked at."""
        values, meta, kind = arguments["weight_values"], arguments["weight_meta"], cls.kind_of(arguments)
        for name, value in (("weight_values", values), ("weight_meta", meta)):
            if value.dim() != 2:
                raise ValueError(f"{op}: {name} must be a matrix, not of shape {list(value.shape)}")
        check_dtype(op, "weight_meta", meta, torch.uint8)
        n = values.shape[0]
        cls._check_shape(op, "weight_meta", meta, k, (n, meta_count(k)))
        if kind is Int4:
            group_size = arguments["group_size"]
            if group_size <= 0 or (group_size < k and group_size % GROUP):
                raise ValueError(f"{op}: group_size must be a multiple of {GROUP} or the whole row, not {group_size}")
        kind.check_values_dtype(op, "weight_values", values)
        kind.check_scales(op, arguments, n, k)
        specs = cls.of_arguments(arguments, k).operands(n, k)
        cls._check_shape(op, "weight_values", values, k, specs["weight_values"].shape)
        return int(n)

    @staticmethod
    def _check_shape(op: str, name: str, value: torch.Tensor, k: int, shape: tuple[int, ...]) -> None:
        if value.shape != shape:
            raise ValueError(
                f"{op}: the last dimension of x is {k}, so {name} must have shape {list(shape)}, "
                f"not {list(value.shape)}"
            )

    def for_layer(self, k: int, dtype: torch.dtype, options: Mapping[str, Any]) -> Sparse24:
        """Those of the values; group_size in columns, a multiple of 4, None or -1: the whole row."""
        inner = dict(options)
        if "group_size" in inner:
            inner["group_size"] = kept_group_size(k, int4.resolve_group_size(k, inner["group_size"]))
        return Sparse24(self.values.for_layer(kept_count(k), dtype, inner))

    @property
    def names(self) -> tuple[str, ...]:
        """Values, places, then what the values' format has beside them."""
        return (*self.NAMES[:2], *self.values.names[1:])

    def options(self, k: int) -> dict[str, Any]:
        """Those of the values, counted in columns."""
        return self._in_columns(self.values.options(kept_count(k)), k)

    def facts(self, k: int) -> dict[str, Any]:
        """Those of the values, counted in columns."""
        return self._in_columns(self.values.facts(kept_count(k)), k)

    @staticmethod
    def _in_columns(options: dict[str, Any], k: int) -> dict[str, Any]:
        kept = options.get("group_size")
        if kept is None:
            return options
        return {**options, "group_size": max(k, 1) if kept >= kept_count(k) else kept * GROUP // KEPT}

    def operands(self, n: int, k: int) -> dict[str, Spec]:
        """``weight_values``, ``weight_meta``, then scales of the values."""
        kept, *scales = self.values.operands(n, kept_count(k)).items()
        meta = Spec((n, meta_count(k)), torch.uint8)
        return {"weight_values": kept[1], "weight_meta": meta, **dict(scales)}

    def quantize(
        self,
        weight: torch.Tensor,
        range_search: str = "minmax",
        importance: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> Operands:
        """mask: bool [N, K], what is kept. Without one a weight that is 2:4 stays as it is, and of any other the larger
        two of every four are kept. There is no importance: in each row other columns are kept.
        """
        if importance is not None:
            raise ValueError("importance of columns says nothing of kept values: in each row they are of other columns")
        return self._of_kept(weight, mask, lambda kept: self.values.quantize(kept, range_search))

    def requantize(self, weight: torch.Tensor, range_search: str = "minmax", eps: float = 0.0) -> Operands:
        """As ``quantize``, the kept values as their format does it."""
        return self._of_kept(weight, None, lambda kept: self.values.requantize(kept, range_search, eps))

    def _of_kept(
        self, weight: torch.Tensor, mask: torch.Tensor | None, quantize: Callable[[torch.Tensor], Operands]
    ) -> Operands:
        check_weight(weight)
        if mask is None and why_not_24(weight):
            mask = best_mask(weight.abs())
        kept, meta = pack(weight, mask)
        made = quantize(kept)
        values = made.pop(self.values.NAMES[0])
        return {"weight_values": values, "weight_meta": meta, **made}

    def _of_values(self, operands: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """What the values' format has of ``operands``, by its own names."""
        first, *others = self.values.names
        return {first: operands["weight_values"], **{name: operands[name] for name in others}}

    def replace_rows(
        self, operands: Mapping[str, torch.Tensor | None], rows: torch.Tensor, new: Mapping[str, torch.Tensor | None]
    ) -> Operands:
        """Places, and the values as their format does it."""
        made = self.values.replace_rows(self._of_values(operands), rows, self._of_values(new))
        meta = present("weight_meta", operands).index_put((rows,), present("weight_meta", new))
        return {"weight_values": made.pop(self.values.names[0]), "weight_meta": meta, **made}

    def dequantize(
        self, operands: Mapping[str, torch.Tensor | None], k: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The dense weight, 0 at the places that are not kept."""
        inner = {**operands, self.values.NAMES[0]: operands["weight_values"]}
        return unpack(self.values.dequantize(inner, kept_count(k), dtype), present("weight_meta", operands), k)

    def sample(self, draw: Draw, n: int, k: int, spread: float | None = None) -> Operands:
        """Random values at random places."""
        made = self.values.sample(draw, n, kept_count(k), spread)
        values = made.pop(self.values.NAMES[0])
        # The six pairs of places in ascending order, as ``VALID`` lists them.
        pair = draw.integers(0, len(VALID), n, group_count(k), dtype=torch.int64)
        nibbles = torch.tensor(VALID, device=pair.device)[pair]
        places = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
        return {"weight_values": values, "weight_meta": pack_places(places), **made}
