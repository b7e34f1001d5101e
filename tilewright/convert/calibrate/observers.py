"""Observers: from the values that a tensor takes on calibration data, one symmetric int8 scale for all of it.

All keep a histogram of magnitudes over [0, limit) and the largest magnitude; when a value exceeds the limit, the limit
is doubled until it does not, and neighbouring bins are joined. So memory is constant and the data may come once only.
"""

from __future__ import annotations

import torch

OBSERVERS = ("minmax", "percentile", "mse")
BINS = 4096
#: Fractions of the largest magnitude that "mse" tries as the clipping range.
CANDIDATES = 96
#: Where activations all but vanish; products of scales must not.
SMALLEST_SCALE = 2.0**-60


def check_observer(observer: str, percentile: float) -> None:
    """Raise ValueError for an unknown observer or a percentile out of range."""
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, not {observer!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], not {percentile!r}")


class Observer:
    """What was seen of one tensor. counts: float64 [BINS]. largest: of all magnitudes. seen: values counted."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        self.largest = 0.0
        self.seen = 0

    def add(self, x: torch.Tensor) -> None:
        """Count the magnitudes of ``x``. Raises ValueError if it holds NaN or Inf."""
        if not x.numel():
            return
        magnitudes = x.detach().abs().float()
        largest = float(magnitudes.amax())
        if not largest < float("inf"):
            raise ValueError("NaN or Inf")
        self.seen += magnitudes.numel()
        if largest > self.largest:
            self.largest = largest
            self._widen(largest)
        if self.limit:
            counts = torch.histc(magnitudes, BINS, 0.0, self.limit)
            self.counts += counts.to("cpu", torch.float64)

    def _widen(self, largest: float) -> None:
        if not self.limit:
            # Room for twice what came first, so that a later, slightly larger value costs no resolution.
            self.limit = 2 * largest
        while self.limit < largest:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
            self.limit *= 2

    def scale(self, observer: str = "minmax", percentile: float = 99.99) -> float:
        """The scale s of q = round(x / s) in -127..127; 1 for a tensor that was zero throughout."""
        check_observer(observer, percentile)
        if not self.largest:
            return 1.0
        if observer == "percentile":
            largest = self._percentile(percentile)
        else:
            largest = self._least_squares() if observer == "mse" else self.largest
        return max(largest / 127, SMALLEST_SCALE)

    def _percentile(self, percentile: float) -> float:
        reached = self.counts.cumsum(0) >= percentile / 100 * self.counts.sum()
        edge = (int(reached.to(torch.uint8).argmax()) + 1) * self.limit / BINS
        return min(edge, self.largest)

    def _least_squares(self) -> float:
        """The clipping range with the least squared error, of rounding within it and of clipping beyond."""
        width = self.limit / BINS
        used = int(self.counts.nonzero().max()) + 1
        counts = self.counts[:used]
        centres = (torch.arange(used, dtype=torch.float64) + 0.5) * width
        ranges = self.largest * torch.linspace(1.0 / CANDIDATES, 1.0, CANDIDATES, dtype=torch.float64).unsqueeze(1)
        step = ranges / 127
        # Where a step is wider than a bin, rounding the centre is exact enough; else the error is that of a uniform
        # value within the step.
        rounded = (centres / step).round().clamp(max=127) * step
        error = torch.where((centres <= ranges) & (step < 4 * width), step.square() / 12, (rounded - centres).square())
        # Exact zeros, which ReLU makes in numbers, round to themselves whatever the step: they weigh nothing.
        total = (error * counts)[:, 1:].sum(1) if used > 1 else error[:, 0]
        return float(ranges[int(total.argmin())])
