"""Pruning a whole model to 2:4 while it stays an ordinary float model: to fine-tune it, or to look before converting.

``prune_model`` zeroes two of every four input columns of linear layers, and of every four input channels of
convolutions. ``hold_masks`` keeps those zeros while the model trains. ``convert_model(model, "sparse24")`` then finds
the weights 2:4 and keeps them as they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tilewright.convert import arguments, calibrate, layers
from tilewright.convert.compress.pruning import CALIBRATED, check_pruning, prune
from tilewright.convert.plan import make_plan
from tilewright.convert.recipes import Pattern, Recipe, Rule, patterns_of
from tilewright.convert.schemes.convolution import Fuse
from tilewright.convert.schemes.sparse24 import Sparse24
from tilewright.convert.text import display_name, listed
from tilewright.kernels.formats import sparse24

logger = logging.getLogger("tilewright")


def as_rows(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K], or that of a convolution [Co, Ci, ...] with the input channels last: [Co * ..., Ci]."""
    return weight if weight.dim() == 2 else weight.movedim(1, -1).reshape(-1, weight.shape[1])


def from_rows(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The reverse of ``as_rows`` for a weight of that shape."""
    if len(shape) == 2:
        return rows
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def prune_model(
    model: nn.Module,
    pruning: str = "magnitude",
    *,
    patterns: Pattern | Iterable[Pattern] = "*",
    exclude: Pattern | Iterable[Pattern] = (),
    masks: Mapping[str, torch.Tensor] | None = None,
    calibration_data: Iterable[Any] | None = None,
    transform: calibrate.Transform | None = None,
    forward_fn: calibrate.ForwardFunction | None = None,
    heads: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Make the weights of linear layers and convolutions 2:4 and return the pruned model, of the same classes.

    pruning: "magnitude", or with ``calibration_data`` "wanda" or "sparsegpt" (``convert.compress.pruning``).
        Convolutions are pruned by magnitude whatever it says. patterns, exclude, heads, calibration_data, transform,
        forward_fn: as of ``convert_model``.
    masks: name of a layer -> bool mask of its weight's shape, for layers whose choice is made; if given, no other layer
        is pruned.
    inplace: write into the parameters of ``model``. Otherwise the result has parameters of its own.

    Raises ValueError for a pattern or name that matches nothing, a mask that is not 2:4, missing data.

    >>> import tilewright as tw
    >>> model = tw.prune_model(nn.Sequential(nn.Linear(64, 32)))
    >>> int((model[0].weight == 0).sum()), 64 * 32 // 2
    (1024, 1024)
    """
    arguments.check_model(model)
    arguments.check_switches(heads=heads, inplace=inplace)
    check_pruning(pruning)
    if pruning in CALIBRATED and calibration_data is None:
        raise ValueError(f"pruning {pruning!r} needs calibration_data")
    required = patterns_of(patterns) if masks is None else tuple(masks)
    if not required:
        raise ValueError("masks names no layer")
    # The schemes say which layers there are, and why one must be left alone.
    rules = [Rule(pattern, scheme) for pattern in required for scheme in (Sparse24(), Fuse())]
    plan = make_plan(model, Recipe(rules, arguments.excluded(model, exclude)), heads=heads or masks is not None)
    if masks is not None and (missing := [name for name in masks if name not in plan.convert]):
        reason = plan.skipped.get(missing[0], "there is no such layer")
        raise ValueError(f"a mask is given for {listed(missing)}, which cannot be pruned: {reason}")
    if not inplace:
        model = copy.deepcopy(model)
    planned = {name: model.get_submodule(name) for name in plan.convert}
    samples: dict[str, calibrate.RowSample] = {}
    if pruning in CALIBRATED and calibration_data is not None:
        linear = {name: layer for name, layer in planned.items() if layers.is_linear(layer)}
        data = calibrate.samples(model, calibration_data, transform=transform, forward_fn=forward_fn)
        samples = calibrate.observe(model, linear, data, Sparse24().sample_rows)
    for name, layer in planned.items():
        sample = samples.get(name)
        rows = None if sample is None else sample.rows
        if sample is not None and rows is None:
            logger.warning("calibration_data did not reach %s: pruned by magnitude", display_name(name))
        given = None if masks is None else masks[name]
        with torch.no_grad():
            try:
                _prune_layer(layer, pruning if rows is not None else "magnitude", rows, given)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {display_name(name)!r}: {error}") from error
    return model


def _prune_layer(layer: nn.Module, pruning: str, rows: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    parameter: torch.Tensor = layer.weight  # type: ignore[assignment]
    turned = layers.is_conv1d(layer)
    weight = parameter.t() if turned else parameter
    if mask is not None:
        if mask.shape != parameter.shape:
            raise ValueError(f"a mask of shape {list(mask.shape)} does not fit a weight of {list(parameter.shape)}")
        mask = as_rows((mask.t() if turned else mask).to(weight.device))
    if mask is None and sparse24.why_not_24(as_rows(weight)) is None:
        return
    pruned = from_rows(prune(as_rows(weight), pruning, rows, mask).weight, weight.shape)
    parameter.copy_(pruned.t() if turned else pruned)


class HeldMasks:
    """Zeros of weights that training leaves alone, until ``remove`` or the end of a ``with`` block.

    masks: name of each layer -> bool mask in the shape of its weight, False where it is held at 0.
    """

    def __init__(self, masks: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> None:
        self.masks = masks
        self._parameters = parameters
        self._handles = [parameters[name].register_hook(_masking(mask)) for name, mask in masks.items()]

    def reapply(self) -> None:
        """Write the zeros again: after an optimiser that moves weights without a gradient, or a loaded state."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self._parameters[name].masked_fill_(~mask.to(self._parameters[name].device), 0.0)

    def remove(self) -> None:
        """Let the weights go."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> HeldMasks:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _masking(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    # Not a product: a gradient may be infinite where the weight is held.
    return lambda grad: grad.masked_fill(~mask.to(grad.device), 0.0)


def hold_masks(model: nn.Module) -> HeldMasks:
    """Keep every 2:4 weight of linear layers and convolutions 2:4 while ``model`` trains.

    Gradients are zeroed where a weight is zero now, so optimisers that start afresh (and weight decay) leave it there.
    Raises ValueError if no weight is 2:4 or may be trained.

    >>> import tilewright as tw
    >>> model = tw.prune_model(nn.Sequential(nn.Linear(64, 32)))
    >>> with tw.hold_masks(model):
    ...     pass  # optimise as ever
    """
    masks: dict[str, torch.Tensor] = {}
    parameters: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2 or not weight.requires_grad:
            continue
        if not (layers.is_linear(module) or isinstance(module, nn.modules.conv._ConvNd)):
            continue
        rows = as_rows(weight.t() if layers.is_conv1d(module) else weight)
        if weight.numel() and sparse24.why_not_24(rows) is None:
            masks[name], parameters[name] = weight.detach() != 0, weight
    if not masks:
        raise ValueError(f"{type(model).__name__} has no 2:4 weight that trains: prune_model makes some")
    return HeldMasks(masks, parameters)
