"""Schemes for convolutions: fused in float, or fused with statically quantised int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tilewright.convert import layers
from tilewright.convert.calibrate import check_observer, relative_error
from tilewright.convert.schemes.base import Scheme, register_scheme
from tilewright.kernels.formats.ranges import check_range_search
from tilewright.kernels.formats.sparse24 import why_not_24
from tilewright.nn import ConvBnAct2d, ConvLayer, Int8ConvBnAct2d, Sparse24ConvBnAct2d


@dataclass(frozen=True)
class ConvScheme(Scheme):
    """What the schemes for convolutions have in common: the converter applies them to the model as a whole."""

    about = "convolutions (nn.Conv1d, nn.Conv2d)"
    conversion = "convolutions"

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Convolutions of any kind."""
        return isinstance(module, nn.modules.conv._ConvNd)

    def why_not(self, module: nn.Module) -> str | None:
        """Why a convolution must be left alone; None if it can be converted."""
        return layers.why_not_convolution(module) or layers.why_not_parameters(module)

    def weight_error(self, module: nn.Module, replacement: nn.Module) -> float | None:
        """See ``Scheme``: against the weight with batch-norm folded in."""
        if not isinstance(module, ConvLayer) or not isinstance(replacement, ConvLayer):
            return None
        return relative_error(replacement.dequantize_weight(), module.dequantize_weight())


@register_scheme
@dataclass(frozen=True)
class Fuse(ConvScheme):
    """Float convolutions with batch-norm folded in, and addition and activation in the same kernel.

    allow_tf32: let a GPU take float32 products in TF32.
    """

    allow_tf32: bool = False

    module: ClassVar[Any] = ConvBnAct2d
    lossless = True

    def build(self, module: nn.Module, **calibration: Any) -> nn.Module:
        """The fused layer. calibration: ``norm``, the batch-norm to fold in."""
        return ConvBnAct2d.from_float(module, allow_tf32=self.allow_tf32, **calibration)  # type: ignore[arg-type]


@register_scheme
@dataclass(frozen=True)
class Sparse24Conv(ConvScheme):
    """Float convolutions, fused as by ``Fuse``, whose weights are 2:4 along the input channels.

    pruning: "given" takes weights that are 2:4 already, as ``prune_model`` makes them, and leaves all others alone;
    "magnitude" prunes them.
    """

    pruning: str = "given"
    allow_tf32: bool = False

    module: ClassVar[Any] = Sparse24ConvBnAct2d

    def __post_init__(self) -> None:
        if self.pruning not in ("given", "magnitude"):
            raise ValueError(f"pruning must be 'given' or 'magnitude' for convolutions, not {self.pruning!r}")

    def why_not(self, module: nn.Module) -> str | None:
        """As for every convolution; also fewer than four input channels in a group, and a weight that is not 2:4."""
        if reason := super().why_not(module):
            return reason
        weight: torch.Tensor = module._parameters["weight"]  # type: ignore[assignment]
        if weight.shape[1] < 4:
            return f"2:4 takes four input channels of a group or more, not {weight.shape[1]}"
        if self.pruning == "given" and why_not_24(weight.movedim(1, -1).flatten(0, -2)):
            return "its weight is not 2:4: prune_model makes it so, and it can then be fine-tuned"
        return None

    def build(self, module: nn.Module, **calibration: Any) -> nn.Module:
        """The fused layer. calibration: ``norm``, the batch-norm to fold in."""
        return Sparse24ConvBnAct2d.from_float(module, allow_tf32=self.allow_tf32, **calibration)  # type: ignore[arg-type]


@register_scheme
@dataclass(frozen=True)
class Int8Static(ConvScheme):
    """int8 convolutions: weights with a scale per output channel, activations with one scale and zero point for each
    whole tensor, found from calibration data. Tensors between such layers stay int8.

    observer: how the range of a tensor is chosen: "minmax" (all that was seen), "percentile" (``percentile`` % of the
    values seen) or "mse" (the least squared error of the values seen). symmetric: no zero points. range_search: of the
    weights, "minmax" or "mse". max_error: a layer whose output errs by more, relative to its norm on calibration
    data, stays in float; None: none does.
    """

    observer: str = "mse"
    percentile: float = 99.99
    range_search: str = "minmax"
    max_error: float | None = None
    symmetric: bool = False

    module: ClassVar[Any] = Int8ConvBnAct2d
    calibrated = True  # there is no scale without

    def __post_init__(self) -> None:
        check_observer(self.observer, self.percentile)
        check_range_search(self.range_search)
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"max_error must be positive or None, not {self.max_error!r}")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, not {self.symmetric!r}")

    def build(self, module: nn.Module, **calibration: Any) -> nn.Module:
        """The quantised layer. calibration: ``input_scale``, for an int8 residual ``residual_scale``, zero points."""
        with torch.no_grad():
            return Int8ConvBnAct2d.from_float(module, range_search=self.range_search, **calibration)  # type: ignore[arg-type]
