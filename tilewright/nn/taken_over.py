"""The places of modules that the layer before them has taken over."""

from __future__ import annotations

import torch
from torch import nn


class FoldedBatchNorm(nn.Module):
    """Passes its input on in place of a batch-norm, through ``then`` if that had an activation of its own.

    num_features: of the batch-norm. source: the name of the convolution that holds its factors. then: what the module
    that stood here did after normalising (timm's ``BatchNormAct2d`` has an activation). images: whether it took batches
    of images alone; the convolution takes single ones too.
    """

    images = False  # of those that were pickled before there was such a thing

    def __init__(self, num_features: int, source: str, then: nn.Module | None = None, images: bool = False):
        super().__init__()
        self.num_features = num_features
        self.source = source
        self.then = then
        self.images = images

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` as it is: the convolution before has normalised already."""
        return input if self.then is None else self.then(input)

    def without(self) -> nn.Module:
        """What stands here once nothing is left of the batch-norm."""
        return nn.Identity() if self.then is None else self.then

    def extra_repr(self) -> str:
        """What was folded, and into what."""
        return f"{self.num_features} channels, in {self.source}"


class FusedActivation(nn.Module):
    """Passes its input on in place of an activation. ``original`` is the module that stood here, for the way back.

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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` as it is: the layer before has applied the activation already."""
        return input

    def extra_repr(self) -> str:
        """What was fused, and where."""
        return f"{self.original!r} in {self.source}"
