"""Schemes for linear layers: int8 or int4 weights, activations as they come or quantised."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tilewright.convert import layers
from tilewright.convert.calibrate import (
    Found,
    Observer,
    OutputErrors,
    RowSample,
    check_observer,
    relative_error,
    search_smoothing,
)
from tilewright.convert.schemes.base import Scheme, register_scheme
from tilewright.kernels.formats.int4 import resolve_group_size
from tilewright.kernels.formats.ranges import check_range_search
from tilewright.nn import (
    Int4Linear,
    Int8ActInt4WeightLinear,
    Int8Linear,
    Int8StaticLinear,
    Int8WeightOnlyLinear,
    QuantizedLinear,
)

#: What a weight-only scheme may round weight and activation to for the product.
COMPUTE_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class LinearScheme(Scheme):
    """What the schemes for linear layers have in common.

    range_search: "minmax", or "mse", which clips outliers where that lowers the squared error (see ``formats.ranges``).
    """

    range_search: str = "minmax"

    about: ClassVar[str] = "linear layers (nn.Linear, transformers' Conv1D)"

    def __post_init__(self) -> None:
        check_range_search(self.range_search)

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Linear layers of any kind."""
        return layers.is_linear(module)

    def why_not(self, module: nn.Module) -> str | None:
        """See ``layers.why_not_linear``."""
        return layers.why_not_linear(module)

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float`` for a layer with this weight."""
        return {"range_search": self.range_search}

    def build(self, module: nn.Module, **calibration: Any) -> QuantizedLinear:
        """The quantised layer, on the device and with the dtype of ``module``."""
        linear = layers.as_linear(module)
        replacement: QuantizedLinear = self.module.from_float(linear, **self.options(linear.weight), **calibration)
        if layers.is_conv1d(module):
            replacement.origin = "Conv1D"
        return replacement

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """For schemes that quantise activations: the input scales that lose least (``calibrate.smoothing``)."""
        if not self.calibrated or sample.rows is None:
            return Found()
        # The search needs the order of its candidates, not the last digit of each: the cheap range search will do.
        quick = dataclasses.replace(self, range_search="minmax")
        found = search_smoothing(layers.as_linear(module), sample, quick.build)
        if quick != self:
            return self._where_better(module, sample, found)
        if layers.is_conv1d(module) and found.replacement is not None:
            found.replacement.origin = "Conv1D"  # type: ignore[assignment]
        return found

    def _where_better(self, module: nn.Module, sample: RowSample, found: Found) -> Found:
        """``found`` if it lowers the error of the output on the sampled rows."""
        errors, tried = OutputErrors(module, sample), []
        for each in (Found(), found) if found.options else (Found(),):
            made = self.build(module, **each.options)
            tried.append(dataclasses.replace(each, replacement=made, error=errors.of(made)))
        return min(tried, key=lambda each: math.inf if each.error is None else each.error)

    def weight_error(self, module: nn.Module, replacement: nn.Module) -> float | None:
        """See ``Scheme``."""
        weight = layers.as_linear(module).weight
        return relative_error(replacement.dequantize_weight(), weight)  # type: ignore[operator]


@dataclass(frozen=True)
class FloatProducts(LinearScheme):
    """What the schemes have in common whose weights are multiplied in a float type.

    compute_dtype: what weight and activation are rounded to for the product: "bfloat16", "float16", None (the dtype of
    the activation) or "auto": bfloat16 for a float32 weight, else None.
    """

    compute_dtype: str | None = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute_dtype not in (None, "auto", *COMPUTE_DTYPES):
            known = " or ".join(map(repr, COMPUTE_DTYPES))
            raise ValueError(f"compute_dtype must be 'auto', None, {known}, not {self.compute_dtype!r}")

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float``."""
        return {**super().options(weight), "compute_dtype": self.compute_dtype}


@dataclass(frozen=True)
class _WeightOnly(FloatProducts):
    """What the weight-only schemes have in common. With calibration data they weigh the errors of a weight by the mean
    square of the input channel it multiplies.

    keep_dequantized: see ``QuantizedLinear``; ``convert_model`` sets it for all layers.
    """

    keep_dequantized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep_dequantized, bool):
            raise TypeError(f"keep_dequantized is True or False, not {self.keep_dequantized!r}")

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float``."""
        return {**super().options(weight), "keep_dequantized": self.keep_dequantized}

    @property
    def calibrated(self) -> bool:
        """If the range is searched."""
        return self.range_search == "mse"

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """Weigh the errors of the weight by its inputs, if the range is searched at all and the output gains."""
        if not self.calibrated or sample.rows is None:
            return Found()
        return self._where_better(module, sample, Found({"importance": sample.rows.float().square().mean(0)}))


@register_scheme
@dataclass(frozen=True)
class Int8Dynamic(LinearScheme):
    """W8A8: int8 weights with a scale per output channel, activations quantised per row as they come.

    With calibration data the converter also finds a scale for each input channel that moves outliers of the activations
    into the weight (SmoothQuant, Xiao et al. 2022, equation 4, the exponent searched for each layer).
    """

    module: ClassVar[Any] = Int8Linear
    calibrated = True  # for the input scales


@register_scheme
@dataclass(frozen=True)
class Int8WeightOnly(_WeightOnly):
    """W8A16: int8 weights with a scale per output channel, multiplied in a 16-bit float type."""

    module: ClassVar[Any] = Int8WeightOnlyLinear


@dataclass(frozen=True)
class Int4Scheme(LinearScheme):
    """What the schemes with int4 weights have in common.

    group_size: input columns that share a scale; None or -1 is the whole row. symmetric: no zero points.
    """

    group_size: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None and (not isinstance(self.group_size, int) or isinstance(self.group_size, bool)):
            raise ValueError(f"group_size must be an int or None (whole row), not {self.group_size!r}")
        resolve_group_size(1, self.group_size)
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, not {self.symmetric!r}")

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float``."""
        return {**super().options(weight), "group_size": self.group_size, "symmetric": self.symmetric}


@register_scheme
@dataclass(frozen=True)
class Int4WeightOnly(_WeightOnly, Int4Scheme):
    """W4A16: int4 weights, a scale (and zero point) for each group of columns, multiplied in a 16-bit float type."""

    range_search: str = "mse"
    symmetric: bool = False

    module: ClassVar[Any] = Int4Linear


@register_scheme
@dataclass(frozen=True)
class Int8ActInt4Weight(Int4Scheme):
    """W4A8: int4 weights in groups, activations quantised to int8 per row; calibrated as ``Int8Dynamic`` is."""

    range_search: str = "mse"

    module: ClassVar[Any] = Int8ActInt4WeightLinear
    calibrated = True  # for the input scales


@register_scheme
@dataclass(frozen=True)
class Int8StaticInputs(LinearScheme):
    """W8A8: int8 weights with a scale per output channel, inputs with one scale for the whole tensor, found from
    calibration data. Other runtimes know it as QDQ; ``Int8Dynamic`` is more accurate.

    observer, percentile: as of ``Int8Static``, over a sample of the rows that reach the layer.
    """

    observer: str = "mse"
    percentile: float = 99.99

    module: ClassVar[Any] = Int8StaticLinear
    calibrated = needs_data = True  # there is no scale without

    def __post_init__(self) -> None:
        super().__post_init__()
        check_observer(self.observer, self.percentile)

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """The scale of the inputs; that of nothing is 1."""
        seen = Observer()
        if sample.rows is not None:
            seen.add(sample.rows)
        scale = seen.scale(self.observer, self.percentile)
        return Found({"input_scale": scale}, note=f"input scale {scale:.3g}")
