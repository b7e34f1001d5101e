"""Rows of what reaches a layer: a sample of them, and what replacing the layer costs on it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tilewright.convert.calibrate.memory import Memory
from tilewright.convert.calibrate.running import first_input, listening, run
from tilewright.kernels.activation import apply_activation

#: Input rows that are kept for each layer.
MAX_ROWS = 512


class RowSample:
    """A uniform sample of at most ``limit`` rows of a stream, and the largest magnitude of each column over all of it.

    rows: [R, K] in the dtype of the stream. largest: float32 [K]. memory: where the rows are counted.
    """

    def __init__(self, limit: int = MAX_ROWS, seed: int = 0, memory: Memory | None = None) -> None:
        self.limit = limit
        self._memory = memory
        self.rows: torch.Tensor | None = None
        self.largest: torch.Tensor | None = None
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: torch.Tensor) -> None:
        """Take in ``x`` [..., K]; rows that hold NaN or Inf are left out."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        largest = rows.abs().amax(0).float()
        if not bool(torch.isfinite(largest).all()):  # which tells of all rows, and takes one pass over them
            rows = rows[torch.isfinite(rows).all(-1)]
            if not len(rows):
                return
            largest = rows.abs().amax(0).float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        # Every row draws a key and the smallest keys stay: a uniform sample of the whole stream, whatever its batches.
        keys = torch.rand(len(rows), generator=self._generator)
        if self.rows is not None:
            if len(self._keys) >= self.limit:
                below = keys < self._keys.amax()
                rows, keys = rows[below.to(rows.device)], keys[below]
            rows, keys = torch.cat([self.rows, rows]), torch.cat([self._keys, keys])
        kept = torch.argsort(keys)[: self.limit]
        self.rows, self._keys = rows[kept.to(rows.device)], keys[kept]
        if self._memory is not None:
            self._memory.count(self, self.rows, self._keys)


@contextlib.contextmanager
def sampling(
    layers: Mapping[str, nn.Module], max_rows: int = MAX_ROWS, memory: Memory | None = None
) -> Iterator[dict[str, RowSample]]:
    """While this is open, what reaches each of ``layers`` is sampled. memory: where the rows are counted."""
    samples = {name: RowSample(max_rows, memory=memory) for name in layers}
    with listening(layers, lambda name, args, kwargs: samples[name].add(first_input(args, kwargs))):
        yield samples


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Iterable[Any],
    max_rows: int = MAX_ROWS,
    called: str = "calibration_data",
) -> dict[str, RowSample]:
    """Run ``model`` on every item of ``data`` (see ``run``) and sample what reaches each of ``layers``.

    called: the argument of ours that holds the data. Raises ValueError if there is none.
    """
    with sampling(layers, max_rows) as samples:
        if not run(model, data, called):
            raise ValueError(f"{called} is empty")
    return samples


#: Elements that are compared at once: memory of a few megabytes is asked of the system, and given back, each time.
_BLOCK = 1 << 17


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float | None:
    """||actual - expected|| / ||expected|| of two tensors [N, ...] in float32, 0 for two zeros; None where it is no
    finite number.
    """
    difference = norm = 0.0
    rows = max(1, _BLOCK // max(1, expected[:1].numel()))
    for a, b in zip(actual.split(rows), expected.split(rows), strict=True):
        b = b.float()
        difference = math.hypot(difference, torch.linalg.vector_norm(a.float() - b).item())
        norm = math.hypot(norm, torch.linalg.vector_norm(b).item())
    if not difference:
        return 0.0
    error = difference / norm if norm else float("inf")
    return error if error < float("inf") else None


@dataclass(frozen=True)
class Found:
    """What a search found. options: keyword arguments of ``build``; empty where none is best. exponent: its. note: for
    the reader of the report. replacement: what ``build`` makes with these options, if the search has made it, and
    error: its ``output_error``.
    """

    options: dict[str, Any] = field(default_factory=dict)
    exponent: float | None = None
    note: str = ""
    replacement: nn.Module | None = field(default=None, compare=False)
    error: float | None = field(default=None, compare=False)


class OutputErrors:
    """Relative errors of what may replace ``layer``, on the sampled rows; its own output is computed once. Hooks of
    ``layer`` do not run.
    """

    def __init__(self, layer: nn.Module, sample: RowSample | None):
        self._rows = None if sample is None else sample.rows
        with torch.no_grad():
            self._expected = None if self._rows is None else layer.forward(self._rows)

    def of(self, replacement: nn.Module) -> float | None:
        """Of one, or None where there are no rows. One that has taken over the activation after it is compared with
        layer and activation.
        """
        if self._rows is None or self._expected is None:
            return None
        with torch.no_grad():
            expected = apply_activation(self._expected, getattr(replacement, "activation", "none"))
            return relative_error(replacement.forward(self._rows), expected)


def output_error(layer: nn.Module, replacement: nn.Module, sample: RowSample | None) -> float | None:
    """Relative error of one replacement's output on the sampled rows, or None: see ``OutputErrors``."""
    return OutputErrors(layer, sample).of(replacement)
