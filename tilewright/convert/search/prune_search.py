"""Which layers of a model to prune to 2:4 so that its output changes by no more than a budget.

Every layer is pruned once and its own output error measured on calibration data. Layers are then taken in the order of
that error, the least first, as many as leave the error of the whole model within the budget: found by halving, since
it all but grows with their number, and then checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewright.convert import arguments, calibrate, layers, structure
from tilewright.convert.converter import convert_model
from tilewright.convert.recipes import Pattern, Recipe, Rule
from tilewright.convert.record import record_of
from tilewright.convert.schemes.base import Scheme
from tilewright.convert.schemes.sparse24 import Sparse24
from tilewright.convert.text import display_name


@dataclass(frozen=True)
class SearchedLayer:
    """error: of the layer's own output once pruned, relative. pruned: whether the budget allows it. saved: bytes."""

    name: str
    error: float
    pruned: bool
    saved: int


@dataclass(frozen=True)
class PruneSearch:
    """What the search found.

    recipe: prunes the chosen layers and leaves all others alone; None if the budget allows none. error: of the whole
    model with them pruned. budget: what it had to stay within. error_of_all: with every layer pruned. layers: the least
    error first.
    """

    recipe: Recipe | None
    error: float
    budget: float
    error_of_all: float
    layers: tuple[SearchedLayer, ...]

    def __str__(self) -> str:
        chosen = sum(layer.pruned for layer in self.layers)
        lines = [
            f"{chosen} of {len(self.layers)} layers pruned: model error {self.error:.4g}, budget {self.budget:.4g}, "
            f"all pruned {self.error_of_all:.4g}"
        ]
        for layer in self.layers:
            what = "pruned" if layer.pruned else "kept dense"
            lines.append(f"{layer.error:8.4f}  {what:10}  {display_name(layer.name)}")
        return "\n".join(lines)


def search_pruning(
    model: nn.Module,
    calibration_data: Iterable[Any],
    budget: float,
    scheme: Scheme | None = None,
    *,
    exclude: Pattern | Iterable[Pattern] = (),
    transform: calibrate.Transform | None = None,
    forward_fn: calibrate.ForwardFunction | None = None,
    heads: bool = False,
    measure: Callable[[nn.Module], float] | None = None,
    progress: bool | None = None,
) -> PruneSearch:
    """Find the layers that ``scheme`` (default: ``Sparse24()``) may prune.

    budget: the largest error of the whole model. measure: the error of a converted model, less is better; by default
    ||y' - y|| / ||y|| over all float outputs on the calibration data. Other options as of ``convert_model``. The model
    is left as it was. Raises ValueError for a negative budget and where ``convert_model`` does.
    """
    if not budget >= 0:
        raise ValueError(f"budget must not be negative, not {budget!r}")
    scheme = scheme or Sparse24()
    arguments.check_model(model)
    data = list(calibrate.samples(model, calibration_data, transform=transform, forward_fn=forward_fn))
    recipe = Recipe([("*", scheme)], arguments.excluded(model, exclude))
    everything = convert_model(model, recipe, heads=heads, calibration_data=data, fuse=False, progress=progress)
    record = record_of(everything)
    errors = {
        name: layer.output_error if layer.output_error is not None else layer.weight_error or 0.0
        for name, layer in record.layers.items()
    }
    order = sorted(errors, key=errors.__getitem__)
    error_of = measure or _relative_to(model, data)
    measured = {0: 0.0 if measure is None else float(error_of(model))}

    def with_first(count: int) -> float:
        if count not in measured:
            measured[count] = float(error_of(_mixed(model, everything, order[:count])))
        return measured[count]

    with_first(len(order))
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if with_first(middle) <= budget else (low, middle - 1)
    rules = [Rule(name, scheme) for name in order[:low]]
    chosen = Recipe([*rules, Rule("*", None)]) if rules else None
    saved = {name: layer.bytes_before - layer.bytes_after for name, layer in record.layers.items()}
    searched = [SearchedLayer(name, errors[name], i < low, saved[name]) for i, name in enumerate(order)]
    return PruneSearch(chosen, measured[low], budget, measured[len(order)], tuple(searched))


def _mixed(model: nn.Module, converted: nn.Module, names: list[str]) -> nn.Module:
    """A copy of ``model`` with the layers called ``names`` taken from ``converted``."""
    mixed = structure.copy_structure(model)
    places = structure.Places(mixed)
    for name in names:
        places.replace(mixed.get_submodule(name), converted.get_submodule(name))
    structure.FastPaths.close(places.root, layers.is_converted)
    return places.root


def _relative_to(model: nn.Module, data: list[Any]) -> Callable[[nn.Module], float]:
    with calibrate.evaluation(model):
        expected = [list(_floats(calibrate.call(model, item))) for item in data]

    def error(other: nn.Module) -> float:
        difference = norm = 0.0
        with calibrate.evaluation(other):
            for item, required in zip(data, expected, strict=True):
                for ours, theirs in zip(_floats(calibrate.call(other, item)), required, strict=True):
                    difference += float((ours.double() - theirs.double()).square().sum())
                    norm += float(theirs.double().square().sum())
        return (difference / norm) ** 0.5 if norm else float(difference > 0)

    return error


def _floats(output: Any) -> Iterator[torch.Tensor]:
    """Every float tensor in an output: a tensor, or containers of them."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from itertools.chain.from_iterable(map(_floats, output.values()))
    elif isinstance(output, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_floats, output))
