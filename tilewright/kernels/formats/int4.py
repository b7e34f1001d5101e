"""int4 weights, eight to an int32 word, with a scale (and zero point) for each group of consecutive columns.

    weight_packed  int32 [N, ceil(K / 8)]   nibble j of word i holds column 8 i + j, a value u in 0..15
    weight_scale   float [N, G]             G = ceil(K / group_size)
    weight_zero    int32 [ceil(N / 8), G]   nibble j of word i holds the zero point of row 8 i + j; absent: 8 everywhere

    w = (u - z) * s

Bit for bit this is compressed-tensors' ``pack-quantized`` layout (its signed value is u - 8), GPTQ's ``qweight``
transposed, and, read as bytes, ``B`` of ONNX Runtime's ``MatMulNBits``. A last group may be short; unused nibbles hold
0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.formats.int8 import check_importance, check_weight
from tilewright.kernels.formats.ranges import row_blocks, search_shrinkage
from tilewright.kernels.formats.weight import (
    SCALE_DTYPES,
    Draw,
    Operands,
    Spec,
    WeightFormat,
    check_operand,
    default_spread,
    present,
)

MIDDLE = 8  # the zero point of a symmetric weight


def group_count(k: int, group_size: int) -> int:
    """Groups in a row of ``k`` columns."""
    return -(-k // group_size)


def resolve_group_size(k: int, group_size: int | None) -> int:
    """``None``, -1 or anything past the row's end means one group for the whole row of ``k`` columns."""
    if group_size is not None and group_size != -1 and group_size <= 0:
        raise ValueError(f"group_size must be positive, -1 or None (whole row), not {group_size}")
    whole = max(k, 1)
    return whole if group_size in (None, -1) else min(group_size, whole)


def pack(values: torch.Tensor) -> torch.Tensor:
    """Integers 0..15 [R, C] -> int32 [R, ceil(C / 8)]."""
    rows, columns = values.shape
    words = group_count(columns, 8)
    nibbles = F.pad(values.to(torch.int32), (0, -columns % 8)).reshape(rows, words, 8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    # The nibbles do not overlap, so the sum is their union; int32 wraps into the sign bit as it should.
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 [R, ceil(columns / 8)] -> uint8 values 0..15 [R, columns]."""
    # Counted on the device: a list would be copied there, which export and CUDA graphs do not like.
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    # By its name: ONNX knows no ``>>`` of two tensors.
    nibbles = (torch.bitwise_right_shift(packed.unsqueeze(-1), shifts) & 15).to(torch.uint8)
    return nibbles.reshape(len(packed), packed.shape[1] * 8)[:, :columns]


def pack_zero(zero: torch.Tensor) -> torch.Tensor:
    """Zero points 0..15 [N, G] -> int32 [ceil(N / 8), G]."""
    return pack(zero.t()).t().contiguous()


def unpack_zero(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """int32 [ceil(rows / 8), G] -> uint8 zero points [rows, G]."""
    return unpack(packed.t(), rows).t()


def unpack_centred(
    weight_packed: torch.Tensor, weight_zero: torch.Tensor | None, group_size: int, k: int
) -> torch.Tensor:
    """The integers u - z as int8 [N, K], in -15..15."""
    centred = unpack(weight_packed, k).to(torch.int8)
    if weight_zero is None:
        return centred - MIDDLE
    zero = unpack_zero(weight_zero, len(centred)).to(torch.int8)
    return centred - zero.repeat_interleave(group_size, dim=1)[:, :k]


def dequantize(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    k: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight [N, K] in ``dtype``; the product is taken in float32 (float64 if that is asked for)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = weight_scale.to(wide).repeat_interleave(group_size, dim=1)[:, :k]
    return unpack_centred(weight_packed, weight_zero, group_size, k).to(wide).mul_(scale).to(dtype)


def _quantize_rows(
    weight: torch.Tensor,
    size: int,
    symmetric: bool,
    range_search: str,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u uint8 [N, K], scale [N, G] in ``scale_dtype``, zero point uint8 [N, G]). eps: see ``Int4.requantize``."""
    weight = weight.float()
    n, k = weight.shape
    groups = group_count(k, size)
    padding = (0, groups * size - k)
    grouped = F.pad(weight, padding).reshape(n, groups, size)
    if importance is not None:
        importance = F.pad(importance, padding).reshape(groups, size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    extent = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15

    def levels(fraction: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = (extent * fraction).to(scale_dtype).float()
        # A zero group, or one whose scale is below the dtype's smallest number, stores zeros.
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.full_like(scale, MIDDLE) if symmetric else torch.round(-low * fraction / scale).clamp_(0, 15)
        u = (torch.round(grouped / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp_(0, 15)
        return u, scale, zero

    def dequantized(fraction: float) -> torch.Tensor:
        u, scale, zero = levels(fraction)
        return (u - zero.unsqueeze(-1)) * scale.unsqueeze(-1)

    fraction = search_shrinkage(grouped, dequantized, range_search, importance)
    if eps is not None and symmetric:
        # The outermost value of a group of levels is level -8 or 7 of them, not the 7.5 of ``extent``.
        for level in (8, 7):
            error = (dequantized(7.5 / level) - grouped).abs().amax(-1)
            fraction = torch.where(error <= 7.5 * extent * (eps + 1e-6), 7.5 / level, fraction)
    u, scale, zero = levels(fraction)
    return u.reshape(n, groups * size)[:, :k].to(torch.uint8), scale.to(scale_dtype), zero.to(torch.uint8)


def quantize(
    weight: torch.Tensor,
    group_size: int | None = 128,
    symmetric: bool = True,
    range_search: str = "minmax",
    scale_dtype: torch.dtype = torch.float32,
    importance: torch.Tensor | None = None,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round to nearest (ties to even). ``weight`` float [N, K] -> (weight_packed, weight_scale, weight_zero or None).

    Symmetric: s = max|w| / 7.5, so that the range is shared by -8..7 with at most half a step clipped at its upper end.
    Asymmetric: the range is min(w, 0)..max(w, 0), so that zero is exact. Values are rounded against the scale as stored
    in ``scale_dtype``. range_search: "minmax" or "mse", which importance [K] may weight (see ``formats.ranges``). eps:
    see ``Int4.requantize``. Raises TypeError or ValueError for a weight that is not a finite float matrix, or whose
    scales overflow ``scale_dtype``.
    """
    check_weight(weight)
    importance = check_importance(importance, weight)
    size = resolve_group_size(weight.shape[1], group_size)
    blocks = [
        _quantize_rows(block, size, symmetric, range_search, scale_dtype, importance, eps)
        for block in row_blocks(weight.detach())
    ]
    u, scale, zero = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    if not torch.isfinite(scale).all():
        raise ValueError(f"scales of this weight overflow {scale_dtype}")
    return pack(u), scale, None if symmetric else pack_zero(zero)


@dataclass(frozen=True)
class Int4(WeightFormat):
    """The format of this file, for operators and modules. group_size: as ``resolve_group_size`` takes it."""

    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32

    name = "int4"
    NAMES = ("weight_packed", "weight_scale", "weight_zero")
    values_dtype = torch.int32

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any], k: int) -> Int4:
        """The format of the weight among an operator's arguments."""
        group_size = resolve_group_size(k, arguments["group_size"])
        return cls(group_size, arguments["weight_zero"] is None, arguments["weight_scale"].dtype)

    @classmethod
    def check(cls, op: str, arguments: Mapping[str, Any], k: int) -> int:
        """N, if the weight fits activations of ``k`` columns."""
        packed, group_size = arguments["weight_packed"], arguments["group_size"]
        if group_size <= 0:
            raise ValueError(f"{op}: group_size must be positive, not {group_size}")
        cls.check_values_dtype(op, "weight_packed", packed)
        if packed.dim() != 2:
            raise ValueError(
                f"{op}: weight_packed must be a matrix [N, ceil(K / 8)], not of shape {list(packed.shape)}"
            )
        n, words = packed.shape
        if words != group_count(k, 8):
            raise ValueError(
                f"{op}: the last dimension of x is {k}, which needs {group_count(k, 8)} words a row, "
                f"but weight_packed has {words}"
            )
        cls.check_scales(op, arguments, n, k)
        return int(n)

    @classmethod
    def check_scales(cls, op: str, arguments: Mapping[str, Any], n: int, k: int) -> None:
        """A scale, and perhaps a zero point, for each group of ``n`` rows of ``k`` columns."""
        scale, zero, group_size = arguments["weight_scale"], arguments["weight_zero"], arguments["group_size"]
        groups = group_count(k, group_size)
        if scale.dtype not in SCALE_DTYPES:
            raise TypeError(f"{op}: weight_scale must be float16, bfloat16 or float32, not {scale.dtype}")
        if scale.shape != (n, groups):
            raise ValueError(
                f"{op}: weight_scale must have shape {[n, groups]} for group_size {group_size}, not {list(scale.shape)}"
            )
        if zero is not None:
            check_operand(op, "weight_zero", zero, Spec((group_count(n, 8), groups), torch.int32))

    def for_layer(self, k: int, dtype: torch.dtype, options: Mapping[str, Any]) -> Int4:
        """group_size, symmetric, scale_dtype: by default the layer's dtype if it has 16 bits, else bfloat16, whose
        range no weight exceeds.
        """
        default = dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
        group_size = resolve_group_size(k, options["group_size"])
        return Int4(group_size, options["symmetric"], options["scale_dtype"] or default)

    def options(self, k: int) -> dict[str, Any]:
        """The group size, of which the number of groups says only so much."""
        return {"group_size": resolve_group_size(k, self.group_size)}

    def facts(self, k: int) -> dict[str, Any]:
        """All of the options."""
        return {**self.options(k), "symmetric": self.symmetric, "scale_dtype": self.scale_dtype}

    def operands(self, n: int, k: int) -> dict[str, Spec]:
        """``weight_packed``, ``weight_scale`` and, if asymmetric, ``weight_zero``."""
        groups = group_count(k, resolve_group_size(k, self.group_size))
        specs = {
            "weight_packed": Spec((n, group_count(k, 8)), torch.int32),
            "weight_scale": Spec((n, groups), self.scale_dtype),
        }
        return specs if self.symmetric else {**specs, "weight_zero": Spec((group_count(n, 8), groups), torch.int32)}

    def quantize(
        self, weight: torch.Tensor, range_search: str = "minmax", importance: torch.Tensor | None = None
    ) -> Operands:
        """As ``quantize`` of this file."""
        made = quantize(weight, self.group_size, self.symmetric, range_search, self.scale_dtype, importance)
        return dict(zip(self.NAMES, made, strict=True))

    def requantize(self, weight: torch.Tensor, range_search: str = "minmax", eps: float = 0.0) -> Operands:
        """Groups that lie on the levels of one scale, to ``eps``, keep them."""
        made = quantize(weight, self.group_size, self.symmetric, range_search, self.scale_dtype, eps=eps)
        return dict(zip(self.NAMES, made, strict=True))

    def replace_rows(
        self, operands: Mapping[str, torch.Tensor | None], rows: torch.Tensor, new: Mapping[str, torch.Tensor | None]
    ) -> Operands:
        """Zero points are packed along the rows, eight to a word."""
        zero = operands["weight_zero"]
        made = super().replace_rows({name: t for name, t in operands.items() if name != "weight_zero"}, rows, new)
        if zero is not None:
            count = int(rows.count_nonzero())
            replaced = unpack_zero(present("weight_zero", new), count)
            zero = pack_zero(unpack_zero(zero, len(rows)).index_put((rows,), replaced))
        return {**made, "weight_zero": zero}

    def dequantize(
        self, operands: Mapping[str, torch.Tensor | None], k: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """As ``dequantize`` of this file."""
        packed, scale = present("weight_packed", operands), present("weight_scale", operands)
        return dequantize(packed, scale, operands["weight_zero"], resolve_group_size(k, self.group_size), k, dtype)

    def sample(self, draw: Draw, n: int, k: int, spread: float | None = None) -> Operands:
        """Integers, all equally likely: their standard deviation is about 5, around random zero points 6.5."""
        spread = default_spread(k) if spread is None else spread
        groups = group_count(k, resolve_group_size(k, self.group_size))
        return {
            "weight_packed": draw.words(n, group_count(k, 8)),
            "weight_scale": (draw.positive(n, groups) * (spread / 5)).to(self.scale_dtype),
            "weight_zero": None if self.symmetric else draw.words(group_count(n, 8), groups),
        }
