"""int8 weights: ``weight`` int8 [N, K] and ``weight_scale`` float32 [N], symmetric, one scale for each output channel.

w = q * s,   q in -127..127
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tilewright.kernels.formats.ranges import all_finite, row_blocks, search_shrinkage
from tilewright.kernels.formats.weight import Draw, Operands, Spec, WeightFormat, default_spread, present

#: What the operator that quantises rows takes.
_ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _round(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale.unsqueeze(-1)).round_().clamp_(-127, 127)


def _quantize_rows(
    weight: torch.Tensor, range_search: str, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if range_search == "minmax" and weight.device.type == "cpu" and weight.dtype in _ROW_DTYPES:
        # Rows of activations are quantised by the same definition, and in one pass.
        return torch.ops.tilewright.quantize_per_row(weight)
    weight = weight.float()
    largest = weight.abs().amax(-1) if weight.shape[1] else weight.new_zeros(len(weight))
    full = largest / 127

    def scale_at(fraction: torch.Tensor | float) -> torch.Tensor:
        scale = full * fraction
        return torch.where(scale == 0, 1.0, scale)

    def dequantized(fraction: float) -> torch.Tensor:
        scale = scale_at(fraction)
        return _round(weight, scale) * scale.unsqueeze(-1)

    scale = scale_at(search_shrinkage(weight, dequantized, range_search, importance))
    return _round(weight, scale).to(torch.int8), scale


def quantize(
    weight: torch.Tensor, range_search: str = "minmax", importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest (ties to even). ``weight`` float [N, K] -> (int8 [N, K], float32 scale [N]).

    range_search: "minmax" or "mse", which importance [K] may weight (see ``formats.ranges``). Raises TypeError or
    ValueError for a weight that is not a finite float matrix.
    """
    check_matrix(weight)
    importance = check_importance(importance, weight)
    blocks = [_quantize_rows(block, range_search, importance) for block in row_blocks(weight.detach())]
    check_finite(*(scale for _, scale in blocks))  # as finite as their rows, and less to read
    q, scale = blocks[0] if len(blocks) == 1 else map(torch.cat, zip(*blocks, strict=True))
    return q.contiguous(), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(int8 [N, K], scale [N]) -> ``dtype`` [N, K]; the product is taken in float32 (float64 if that is asked for)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return q.to(wide).mul_(scale.to(wide).unsqueeze(-1)).to(dtype)


def check_weight(weight: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless ``weight`` is a finite float matrix."""
    check_matrix(weight)
    check_finite(weight)


def check_matrix(weight: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless ``weight`` is a float matrix."""
    if not weight.is_floating_point():
        raise TypeError(f"a weight to quantise must be float, not {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"a weight to quantise must be a matrix [N, K], not of shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("a weight to quantise must hold data, but is on the meta device")


def check_finite(*weights: torch.Tensor) -> None:
    """Raise ValueError if one of ``weights``, or what stands for them, holds NaN or Inf."""
    if not all(map(all_finite, weights)):
        raise ValueError("a weight to quantise must be finite, but holds NaN or Inf")


def check_importance(importance: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """``importance`` as float32 beside the weight [N, K]. Raises ValueError unless it is finite, non-negative and
    [K].
    """
    if importance is None:
        return None
    if importance.shape != weight.shape[1:]:
        raise ValueError(f"importance must have shape {list(weight.shape[1:])}, not {list(importance.shape)}")
    if not (torch.isfinite(importance) & (importance >= 0)).all():
        raise ValueError("importance must be finite and non-negative")
    return importance.to(weight.device, torch.float32)


@dataclass(frozen=True)
class Int8(WeightFormat):
    """The format of this file, for operators and modules."""

    name = "int8"
    NAMES = ("weight", "weight_scale")
    values_dtype = torch.int8

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any], k: int) -> Int8:
        """There is only one."""
        return cls()

    @classmethod
    def check(cls, op: str, arguments: Mapping[str, Any], k: int) -> int:
        """N, if the weight fits activations of ``k`` columns."""
        weight = arguments["weight"]
        cls.check_values_dtype(op, "weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"{op}: weight must be a matrix [N, K], not of shape {list(weight.shape)}")
        n, columns = weight.shape
        if k != columns:
            raise ValueError(f"{op}: the last dimension of x is {k}, but the weight takes {columns}")
        cls.check_scales(op, arguments, n, k)
        return int(n)

    def operands(self, n: int, k: int) -> dict[str, Spec]:
        """``weight`` and ``weight_scale``."""
        return {"weight": Spec((n, k), torch.int8), "weight_scale": Spec((n,), torch.float32)}

    def quantize(
        self, weight: torch.Tensor, range_search: str = "minmax", importance: torch.Tensor | None = None
    ) -> Operands:
        """As ``quantize`` of this file."""
        return dict(zip(self.NAMES, quantize(weight, range_search, importance), strict=True))

    def dequantize(
        self, operands: Mapping[str, torch.Tensor | None], k: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """As ``dequantize`` of this file."""
        return dequantize(present("weight", operands), present("weight_scale", operands), dtype)

    def sample(self, draw: Draw, n: int, k: int, spread: float | None = None) -> Operands:
        """Integers, all equally likely: their standard deviation is 73."""
        spread = default_spread(k) if spread is None else spread
        values = draw.integers(-127, 128, n, k, dtype=torch.int8)
        return {"weight": values, "weight_scale": draw.positive(n) * (spread / 73)}
