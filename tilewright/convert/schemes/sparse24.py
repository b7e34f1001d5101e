"""Schemes for 2:4 weights: pruned on conversion, by magnitude or by what calibration data tells."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tilewright.convert import layers
from tilewright.convert.calibrate import Found, RowSample, search_smoothing
from tilewright.convert.compress.pruning import CALIBRATED, PRUNINGS, check_pruning, prune
from tilewright.convert.schemes.base import register_scheme
from tilewright.convert.schemes.linear import FloatProducts, Int4Scheme, LinearScheme
from tilewright.kernels.formats.sparse24 import why_not_24
from tilewright.nn import Sparse24Int4Linear, Sparse24Int8Linear, Sparse24Linear


@dataclass(frozen=True)
class _Sparse24Scheme(LinearScheme):
    """What the 2:4 schemes have in common.

    pruning: "magnitude", "wanda" or "sparsegpt" (see ``convert.compress.pruning``), or "auto": SparseGPT where
    calibration data reaches the layer, else magnitude. A weight that is 2:4 already is kept as it is.
    """

    pruning: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pruning(self.pruning, ("auto", *PRUNINGS))

    @property
    def calibrated(self) -> bool:
        """Unless what is kept goes by magnitude."""
        return self.pruning != "magnitude"

    @property
    def needs_data(self) -> bool:
        """Whether the pruning reads inputs."""
        return self.pruning in CALIBRATED

    @property
    def sample_rows(self) -> int:
        """As many as make the Hessian of a wide layer."""
        return 4096 if self.calibrated else super().sample_rows

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """What to keep of the weight, and its values after pruning."""
        weight = layers.as_linear(module).weight.detach()
        if why_not_24(weight) is None:
            return Found(note="its weight was 2:4 already")
        if sample.rows is None:
            return Found(note="the calibration data did not reach it: pruned by magnitude")
        pruning = "sparsegpt" if self.pruning == "auto" else self.pruning
        found = prune(weight, pruning, sample.rows)
        return Found({"weight": found.weight, "mask": found.mask})


@register_scheme
@dataclass(frozen=True)
class Sparse24(FloatProducts, _Sparse24Scheme):
    """2:4 weights with float values: two of every four consecutive input columns are kept.

    Values are stored in ``compute_dtype`` (None: in the dtype of the weight). There is nothing to quantise, so
    ``range_search`` must be "minmax".
    """

    module: ClassVar[Any] = Sparse24Linear

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range_search != "minmax":
            raise ValueError(f"Sparse24 quantises nothing: range_search must be 'minmax', not {self.range_search!r}")

    def options(self, weight: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of ``from_float``."""
        return {"values_dtype": self.compute_dtype, "compute_dtype": self.compute_dtype}


@register_scheme
@dataclass(frozen=True)
class Sparse24Int8(_Sparse24Scheme):
    """2:4 weights with int8 values, activations quantised per row; calibrated as ``Int8Dynamic`` is, after pruning."""

    module: ClassVar[Any] = Sparse24Int8Linear
    calibrated = True  # for the input scales

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """What to keep, then the input scales that lose least."""
        found = super().search(module, sample)
        if sample.rows is None:
            return found
        quick = dataclasses.replace(self, range_search="minmax")
        linear, pruned = layers.as_linear(module), None
        if found.options:
            pruned = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            kept = torch.where(found.options["mask"], found.options["weight"], 0).to(linear.weight.dtype)
            pruned.weight, pruned.bias = nn.Parameter(kept, requires_grad=False), linear.bias
        scaled = search_smoothing(linear, sample, quick.build, pruned)
        return Found({**found.options, **scaled.options}, scaled.exponent, found.note)


@register_scheme
@dataclass(frozen=True)
class Sparse24Int4(FloatProducts, Int4Scheme, _Sparse24Scheme):
    """2:4 weights with int4 values and a scale for each group of columns, multiplied in a 16-bit float type.

    group_size: columns, of which half are kept; a multiple of four.
    """

    range_search: str = "mse"

    module: ClassVar[Any] = Sparse24Int4Linear

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None and self.group_size > 0 and self.group_size % 4:
            raise ValueError(f"groups of columns are made of groups of four: group_size must not be {self.group_size}")
