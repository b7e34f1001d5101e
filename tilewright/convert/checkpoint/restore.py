"""What a manifest says of layers, and how they are put back into a fresh model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tilewright.convert.graph import is_norm
from tilewright.convert.layers import as_linear, is_conv1d, is_linear, why_not_convolution
from tilewright.convert.network.convolutions import folded, install_programs
from tilewright.convert.record import join
from tilewright.convert.structure import Places
from tilewright.nn import ConvLayer, FoldedBatchNorm, QuantizedLinear
from tilewright.nn.conv_layer import SIZES, common_options
from tilewright.nn.kinds import DropIn


def folded_norms(model: nn.Module) -> dict[str, str]:
    """The name of each folded batch-norm, and of the convolution that holds it."""
    return {name: module.source for name, module in model.named_modules() if isinstance(module, FoldedBatchNorm)}


def names_of_before(model: nn.Module) -> dict[str, str]:
    """What the tensors of converted layers may be called in checkpoints of before the first release -> what now."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, DropIn):
            found |= {join(prefix, old): join(prefix, new) for old, new in module.renamed().items()}
    return found


def why_not_in_place_of(old: nn.Module, new: QuantizedLinear | ConvLayer) -> str | None:
    """How the layer ``old`` of the factory differs from what ``new`` was made of, or None."""
    if isinstance(new, ConvLayer):
        return _why_not_convolution(old, new)
    if not is_linear(old) or is_conv1d(old) != (new.origin == "Conv1D"):
        return f"was a {new.origin}, but the factory's is a {type(old).__name__}"
    linear = as_linear(old)
    required, there = (linear.in_features, linear.out_features), (new.in_features, new.out_features)
    if required != there:
        return f"maps {there[0]} features to {there[1]}, the factory's {required[0]} to {required[1]}"
    return None


def _why_not_convolution(old: nn.Module, new: ConvLayer) -> str | None:
    if not isinstance(old, nn.modules.conv._ConvNd):
        return f"was a {new.origin}, but the factory's is a {type(old).__name__}"
    if reason := why_not_convolution(old):
        return reason
    required = common_options(old, True)  # type: ignore[arg-type]
    for name in (*SIZES, "origin"):
        there, expected = getattr(new, name), required[name]
        if there != expected:
            return f"has {name}={there}, the factory's {expected}"
    return None


def fold_named(model: nn.Module, norms: Mapping[str, str]) -> None:
    """Put ``FoldedBatchNorm`` where a checkpoint says that there is one. Raises ValueError if the model has none."""
    modules, places = dict(model.named_modules()), Places(model)
    for name, source in norms.items():
        norm, conv = modules.get(name), modules.get(source)
        channels: Any = getattr(getattr(norm, "running_mean", None), "numel", lambda: None)()
        if norm is None or not is_norm(norm) or channels is None:
            raise ValueError(f"the model has no batch-norm {name!r} that a convolution could hold")
        if not isinstance(conv, ConvLayer) or conv.out_channels != channels:
            raise ValueError(f"the model has no fused convolution {source!r} of {channels} channels for {name!r}")
        places.replace(norm, folded(norm, source))


def finish(model: nn.Module, untraced: dict[str, str]) -> None:
    """After the tensors are in: read the scales of activations, and give the model its programs.

    untraced: what was found not to trace when the model was converted, name -> reason.
    """
    for module in model.modules():
        if isinstance(module, DropIn):
            module.refresh()
    if any(isinstance(module, ConvLayer) for module in model.modules()):
        install_programs(model, untraced)
