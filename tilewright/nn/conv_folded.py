"""The place of a batch-norm that the convolution before it has taken over."""

from __future__ import annotations

import torch
from torch import nn


class FoldedBatchNorm(nn.Module):
    """Passes its input on, through ``then`` if the batch-norm had an activation of its own.

    num_features: of the batch-norm. source: the name of the convolution that holds its factors. then: what the module
    that stood here did after normalising (timm's ``BatchNormAct2d`` has an activation).
    """

    def __init__(self, num_features: int, source: str, then: nn.Module | None = None):
        super().__init__()
        self.num_features = num_features
        self.source = source
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as it is: the convolution before has normalised already."""
        return x if self.then is None else self.then(x)

    def extra_repr(self) -> str:
        """What was folded, and into what."""
        return f"{self.num_features} channels, in {self.source}"
