"""The place of an activation that the linear layer before it has taken over."""

from __future__ import annotations

import torch
from torch import nn


class FusedActivation(nn.Module):
    """Passes its input on. ``original`` is the activation module that stood here, for the way back.

    It is kept out of the module tree, so that nothing that walks the model takes it for a part that runs. source: the
    name, in the same parent, of the layer that applies the activation.
    """

    def __init__(self, original: nn.Module, source: str):
        super().__init__()
        self._original = (original,)
        self.source = source

    @property
    def original(self) -> nn.Module:
        """The activation that stood here."""
        return self._original[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as it is: the layer before has applied the activation already."""
        return x

    def extra_repr(self) -> str:
        """What was fused, and where."""
        return f"{self.original!r} in {self.source}"
