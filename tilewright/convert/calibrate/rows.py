"""Finds, from sample inputs, a scale for each input channel that makes int8 activations lose less.

Activations are quantised per row, so one large channel makes the steps coarse for all others. With c > 0 for each
input channel

    x W^T = (x c) (W / c)^T

and c below 1 for large channels moves their size into the weight, which has a scale of its own for every row.
SmoothQuant (Xiao et al. 2022, equation 4) takes 1 / c_j = max|x_j|^a / max|W_j|^(1 - a). Here the exponent a is
searched for each layer: the one with the least squared error of the quantised layer's output on sampled rows. No scale
at all is among the candidates.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tilewright.kernels.activation import apply_activation

#: Exponents that the search tries.
EXPONENTS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
#: What is left of the error where a scale is worth having: it costs a pass over the input at every call.
WORTHWHILE = 0.7
#: Input rows that are kept for each layer.
MAX_ROWS = 512


class RowSample:
    """A uniform sample of at most ``limit`` rows of a stream, and the largest magnitude of each column over all of it.

    rows: [R, K] in the dtype of the stream. largest: float32 [K].
    """

    def __init__(self, limit: int = MAX_ROWS, seed: int = 0) -> None:
        self.limit = limit
        self.rows: torch.Tensor | None = None
        self.largest: torch.Tensor | None = None
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: torch.Tensor) -> None:
        """Take in ``x`` [..., K]; rows that hold NaN or Inf are left out."""
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows[torch.isfinite(rows).all(-1)]
        if not len(rows):
            return
        largest = rows.abs().amax(0).float()
        # Every row draws a key and the smallest keys stay: a uniform sample of the whole stream, whatever its batches.
        keys = torch.rand(len(rows), generator=self._generator)
        if self.rows is None or self.largest is None:
            self.largest = largest
            candidates, all_keys = rows, keys
        else:
            self.largest = torch.maximum(self.largest, largest)
            below = (
                keys < self._keys.amax() if len(self._keys) >= self.limit else torch.ones(len(keys), dtype=torch.bool)
            )
            candidates = torch.cat([self.rows, rows[below.to(rows.device)]])
            all_keys = torch.cat([self._keys, keys[below]])
        kept = torch.argsort(all_keys)[: self.limit]
        self.rows, self._keys = candidates[kept.to(candidates.device)], all_keys[kept]


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any], max_rows: int = MAX_ROWS
) -> dict[str, RowSample]:
    """Run ``model`` on every item of ``data`` and sample what reaches each of ``layers``.

    An item is a mapping (keyword arguments), a tuple or list (positional arguments) or a single argument. The model
    runs in eval mode without gradients; modes are put back. Raises ValueError if there is no data.
    """
    samples = {name: RowSample(max_rows) for name in layers}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            samples[name].add(args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    batches = 0
    try:
        with evaluation(model):
            for item in data:
                call(model, item)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("calibration_data is empty")
    return samples


def first_of(data: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """The first item of ``data``, or None, and all of it, that item included. A mapping is one item."""
    if data is None:
        return None, None
    if isinstance(data, Mapping):
        data = [data]
    items = iter(data)
    first = next(items, None)
    # What can be gone through once only has lost its first item.
    return first, itertools.chain([] if first is None else [first], items) if items is data else data


def call(model: nn.Module, item: Any) -> Any:
    """``model`` on one sample input, in one of the forms that ``observe`` describes."""
    if isinstance(item, Mapping):
        return model(**item)
    if isinstance(item, (tuple, list)):
        return model(*item)
    return model(item)


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and every layer really called (PyTorch's native encoder path reads weights instead)."""
    training = {module for module in model.modules() if module.training}
    native = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(native)
        for module in training:
            module.training = True


def smoothing_scale(largest_x: torch.Tensor, largest_w: torch.Tensor, exponent: float) -> torch.Tensor:
    """c of the equation above, float32 [K], with a geometric mean of 1.

    largest_x, largest_w: max|x_j| and max|W_j| of each input channel [K]. Channels that are zero on either side count
    as the smallest one that is not.
    """
    x, w = _without_zeros(largest_x.float()), _without_zeros(largest_w.float())
    logarithm = (1 - exponent) * w.log() - exponent * x.log()
    return (logarithm - logarithm.mean()).exp()


def _without_zeros(values: torch.Tensor) -> torch.Tensor:
    positive = values[values > 0]
    return values.clamp(min=positive.amin()) if len(positive) else torch.ones_like(values)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float | None:
    """||actual - expected|| / ||expected|| in float32, 0 for two zeros; None where it is no finite number."""
    difference = torch.linalg.vector_norm(actual.float() - expected.float()).item()
    norm = torch.linalg.vector_norm(expected.float()).item()
    if not difference:
        return 0.0
    error = difference / norm if norm else float("inf")
    return error if error < float("inf") else None


@dataclass(frozen=True)
class Found:
    """What a search found. options: keyword arguments of ``build``; empty where none is best. exponent: its. note: for
    the reader of the report.
    """

    options: dict[str, Any] = field(default_factory=dict)
    exponent: float | None = None
    note: str = ""


def output_error(layer: nn.Module, replacement: nn.Module, sample: RowSample | None) -> float | None:
    """Relative error of the replacement's output on the sampled rows, or None. Hooks of ``layer`` do not run.

    A replacement that has taken over the activation after it is compared with layer and activation.
    """
    if sample is None or sample.rows is None:
        return None
    with torch.no_grad():
        expected = apply_activation(layer.forward(sample.rows), getattr(replacement, "activation", "none"))
        return relative_error(replacement.forward(sample.rows), expected)


def search_importance(module: nn.Module, sample: RowSample, build: Callable[..., nn.Module]) -> Found:
    """Whether to weigh the errors of a weight by the mean square of the input channel it multiplies.

    build: makes the quantised layer, with ``importance=`` float32 [K] or without. The weighing is kept if it lowers the
    error of the output on the sampled rows.
    """
    if sample.rows is None:
        return Found()
    options = {"importance": sample.rows.float().square().mean(0)}
    plain, weighed = (output_error(module, build(**given), sample) for given in ({}, options))
    better = weighed is not None and (plain is None or weighed < plain)
    return Found(options) if better else Found()


def search_smoothing(
    linear: nn.Linear,
    sample: RowSample,
    build: Callable[..., nn.Module],
    exponents: Iterable[float] = EXPONENTS,
) -> Found:
    """Try every exponent on the sampled rows and keep what comes nearest to the float layer, if that is worth a pass.

    build: makes the quantised layer, with ``channel_scale=`` float32 [K] or without.
    """
    if sample.rows is None or sample.largest is None:
        return Found()
    with torch.no_grad():
        largest_w = linear.weight.detach().abs().amax(0)
        plain, best = output_error(linear, build(), sample), Found()
        least = None if plain is None else WORTHWHILE * plain
        for exponent in exponents:
            scale = smoothing_scale(sample.largest, largest_w, exponent)
            error = output_error(linear, build(channel_scale=scale), sample)
            if error is not None and (least is None or error < least):
                least, best = error, Found({"channel_scale": scale}, exponent)
    return best
