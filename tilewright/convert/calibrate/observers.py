"""Observers: from the values that a tensor takes on calibration data, one int8 scale (and zero point) for all of it.

All keep a histogram of the values over [-limit, limit) and the least and the largest; when a magnitude exceeds the
limit, the limit is doubled until it does not, and neighbouring bins are joined. So memory is constant and the data may
come once only.
"""

from __future__ import annotations

import torch

from tilewright.kernels.cpu import native

OBSERVERS = ("minmax", "percentile", "mse")
#: On either side of zero.
BINS = 4096
#: Fractions of what was seen that "mse" tries as the clipping range.
CANDIDATES = 96
#: How many of them at once.
_TOGETHER = 8
#: Where activations all but vanish; products of scales must not.
SMALLEST_SCALE = 2.0**-60


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its dimensions in the order in which it lies in memory: PyTorch reduces an image whose channels are
    last twenty times as fast when they are.
    """
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)) if x.layout == torch.strided else x


def check_observer(observer: str, percentile: float) -> None:
    """Raise ValueError for an unknown observer or a percentile out of range."""
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, not {observer!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], not {percentile!r}")


class Observer:
    """What was seen of one tensor. counts: float64 [2 BINS]. least, largest: 0 if all values are above, below. seen:
    values counted.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * BINS, dtype=torch.float64)
        self.limit = 0.0
        self.least = self.largest = 0.0
        self.seen = 0

    def add(self, x: torch.Tensor) -> None:
        """Count the values of ``x``. Raises ValueError if it holds NaN or Inf."""
        if not x.numel():
            return
        values = in_memory_order(x.detach()).float()
        least, largest = (float(each) for each in torch.aminmax(values))
        if not (least > -float("inf") and largest < float("inf")):
            raise ValueError("NaN or Inf")
        self.seen += values.numel()
        self.least, self.largest = min(self.least, least), max(self.largest, largest)
        self._widen(max(-least, largest))
        if self.limit:
            counts = native.histogram(values, 2 * BINS, self.limit)
            if counts is None:
                counts = torch.histc(values, 2 * BINS, -self.limit, self.limit)
            self.counts += counts.to("cpu", torch.float64)

    def _widen(self, largest: float) -> None:
        if not self.limit:
            # Room for twice what came first, so that a later, slightly larger value costs no resolution.
            self.limit = 2 * largest
        while self.limit < largest:
            ends = self.counts.new_zeros(BINS // 2)
            self.counts = torch.cat([ends, self.counts.view(-1, 2).sum(1), ends])
            self.limit *= 2

    def scale(self, observer: str = "minmax", percentile: float = 99.99) -> float:
        """The scale s of q = round(x / s) in -127..127; 1 for a tensor that was zero throughout."""
        check_observer(observer, percentile)
        most = max(-self.least, self.largest)
        if not most:
            return 1.0
        if observer == "percentile":
            most = min(most, _percentile(self.counts[BINS:] + self.counts[:BINS].flip(0), percentile) * self.limit)
        elif observer == "mse":
            ranges = most * _fractions()
            most = float(ranges[int(self._errors(-ranges, ranges).argmin())])
        return max(most / 127, SMALLEST_SCALE)

    def grid(self, observer: str = "minmax", percentile: float = 99.99) -> tuple[float, int]:
        """The scale s and the zero point z of q = round(x / s) + z in -127..127; 1 and 0 for a tensor that was zero
        throughout.
        """
        check_observer(observer, percentile)
        least, largest = self.least, self.largest
        if not largest - least:
            return 1.0, 0
        if observer == "percentile":
            outside = (100 - percentile) / (2 if least and largest else 1)  # on each side that has values
            largest = min(largest, _percentile(self.counts[BINS:], 100 - outside, self.counts[:BINS]) * self.limit)
            below = self.counts[:BINS].flip(0)
            least = max(least, -_percentile(below, 100 - outside, self.counts[BINS:]) * self.limit)
        elif observer == "mse":
            least, largest = self._least_squares()
        step, zero = _grids(torch.tensor(least, dtype=torch.float64), torch.tensor(largest, dtype=torch.float64))
        return float(step), int(zero)

    def _least_squares(self) -> tuple[float, float]:
        """The clipping range with the least error: both ends drawn in together, then each by itself."""
        fractions = _fractions()
        lows, highs = self.least * fractions, self.largest * fractions
        best = int(self._errors(lows, highs).argmin())
        low, high = lows[best], highs[best]
        for _ in range(2 if self.least and self.largest else 0):
            low = lows[int(self._errors(lows, high.expand_as(lows)).argmin())]
            high = highs[int(self._errors(low.expand_as(highs), highs).argmin())]
        return float(low), float(high)

    def _errors(self, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
        """Squared error of the values seen, of rounding within each range and of clipping beyond. lows, highs: float64
        [candidates].
        """
        width = self.limit / BINS
        used = self.counts.nonzero().flatten()
        counts = self.counts[used]
        centres = (used - BINS + 0.5) * width
        # Exact zeros, which ReLU makes in numbers, round to themselves whatever the step: they weigh nothing.
        weights = torch.where(used == BINS, 0.0, counts)
        found = []
        # Some at a time: what all take together is many times what a cache holds.
        lows, highs = lows.unsqueeze(1), highs.unsqueeze(1)
        parts = (each.split(_TOGETHER) for each in (lows, highs, *_grids(lows, highs)))
        for low, high, step, zero in zip(*parts, strict=True):
            rounded = centres / step
            rounded.round_().add_(zero).clamp_(-127, 127).sub_(zero).mul_(step)
            error = rounded.sub_(centres).square_()
            # Where a step is wider than a bin, rounding the centre is exact enough; else the error is that of a
            # uniform value within the step.
            narrow = step < 4 * width
            if bool(narrow.any()):
                inside = (centres >= low) & (centres <= high)
                error = torch.where(inside & narrow, step.square() / 12, error)
            found.append(error.mul_(weights).sum(1))
        return torch.cat(found)


def _fractions() -> torch.Tensor:
    return torch.linspace(1.0 / CANDIDATES, 1.0, CANDIDATES, dtype=torch.float64)


def _grids(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero point with which the integers reach from ``low`` <= 0 to ``high`` >= 0.

    Zero points are even: with odd ones tools disagree on ties (findings/odd_zero_point_ties.sh).
    """
    below = 2 * ((-127 - low * 254 / (high - low)) / 2).floor()
    zeros = torch.stack([below, below + 2]).clamp(-126, 126)
    steps = torch.maximum(high / (127 - zeros), -low / (127 + zeros))
    return steps.amin(0).clamp_min(SMALLEST_SCALE), torch.where(steps[0] < steps[1], zeros[0], zeros[1])


def _percentile(counts: torch.Tensor, percentile: float, others: torch.Tensor | None = None) -> float:
    """The fraction of the range of ``counts`` that ``percentile`` % of them, and of ``others``, stay below."""
    rest = 0.0 if others is None else float(others.sum())
    reached = rest + counts.cumsum(0) >= percentile / 100 * (rest + counts.sum())
    return (int(reached.to(torch.uint8).argmax()) + 1) / len(counts)
