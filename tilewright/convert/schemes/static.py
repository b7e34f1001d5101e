"""The scheme of linear layers whose inputs are quantised with a scale from calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from tilewright.convert.calibrate.observers import Observer, check_observer
from tilewright.convert.calibrate.rows import Found, RowSample
from tilewright.convert.schemes.base import _LinearScheme, register_scheme
from tilewright.nn import Int8StaticLinear


@register_scheme
@dataclass(frozen=True)
class Int8StaticInputs(_LinearScheme):
    """W8A8: int8 weights with a scale per output channel, inputs with one scale for the whole tensor, found from
    calibration data. Other runtimes know it as QDQ; ``Int8Dynamic`` is more accurate.

    observer, percentile: as of ``Int8Static``, over a sample of the rows that reach the layer.
    """

    observer: str = "mse"
    percentile: float = 99.99

    module: ClassVar[Any] = Int8StaticLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_observer(self.observer, self.percentile)

    @property
    def calibrated(self) -> bool:
        """Always: there is no scale without."""
        return True

    @property
    def needs_data(self) -> bool:
        """Always."""
        return True

    def search(self, module: nn.Module, sample: RowSample) -> Found:
        """The scale of the inputs; that of nothing is 1."""
        seen = Observer()
        if sample.rows is not None:
            seen.add(sample.rows)
        scale = seen.scale(self.observer, self.percentile)
        return Found({"input_scale": scale}, note=f"input scale {scale:.3g}")
