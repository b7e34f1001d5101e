"""The places of modules that the layer before them has taken over."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Where the metadata of a state dict says what a layer has taken over: [activation, place].
_SAID = "fused_activation"


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


class TakesActivation(nn.Module):
    """A layer that may apply the activation that follows it, whose place a ``FusedActivation`` keeps.

    fused_activation: the name of that place, in the module that holds both; "" where nothing was taken over. Such a
    layer is one of its model alone. So its ``config`` is that of the layer without, and the metadata of its state dict
    says what it applies, and for whom. A state dict that says nothing, as that of a layer which has taken over nothing,
    may be loaded into any; one that contradicts the layer is an error.
    """

    activation: str
    fused_activation: str = ""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fused_activation and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_SAID] = [self.activation, self.fused_activation]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        metadata, error_msgs = rest[0], rest[-1]
        if reason := self._why_not_fused_as(*metadata.get(_SAID, ("none", ""))):
            error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {reason}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _why_not_fused_as(self, activation: str, place: str) -> str | None:
        """How this layer contradicts one that has taken ``activation`` over, or None. Where it applies none itself, a
        module of its model does.
        """
        if "none" in (activation, self.activation):
            return None
        if activation != self.activation:
            return f"the state dict is of a layer that applies {activation}, this one applies {self.activation}"
        if not self.fused_activation:
            return (
                f"the state dict is of a layer that applies {activation} in the place of the module {place!r} beside "
                "it, which would apply it again here: make the layer with activation='none', or the model with "
                "convert_model or load_model"
            )
        return None


class FusedActivation(nn.Module):
    """Passes its input on in place of an activation. ``original`` is the module that stood here, for the way back.

    It is kept out of the module tree, so that nothing that walks the model takes it for a part that runs. source: the
    name, in the same parent, of the layer that applies the activation.
    """

    _parent: _Parent | None

    def __init__(self, original: nn.Module, source: str):
        super().__init__()
        self._original = (original,)
        self.source = source
        #: The name of the activation, and the module that holds both.
        self.applied, self._parent = "", None

    @classmethod
    def put(cls, parent: nn.Module, name: str, source: str, activation: str) -> None:
        """Have ``source`` apply the activation that stands in ``parent`` under ``name``."""
        original, layer = parent._modules[name], parent._modules[source]
        if original is None or not isinstance(layer, TakesActivation):
            raise ValueError(f"{type(parent).__name__} has no layer {source!r} that could apply {name!r}")
        layer.activation, layer.fused_activation = activation, name
        place = cls(original, source)
        place.applied, place._parent = activation, _Parent(parent)
        parent._modules[name] = place

    @classmethod
    def take_back(cls, parent: nn.Module, only: nn.Module | None = None) -> None:
        """Undo ``put`` in ``parent``. only: of this layer."""
        for name, place in parent._modules.items():
            if isinstance(place, FusedActivation):
                layer = parent._modules.get(place.source)
                if only is not None and layer is not only:
                    continue
                parent._modules[name] = place.original.train(place.training)
                if isinstance(layer, TakesActivation):
                    layer.activation, layer.fused_activation = "none", ""

    @property
    def original(self) -> nn.Module:
        """The activation that stood here."""
        return self._original[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` as it is: the layer before has applied the activation already. Raises RuntimeError if it was
        replaced by one that does not, or wrapped in one that goes on to compute.
        """
        parent = vars(self).get("_parent")
        if parent is not None and not torch.compiler.is_compiling():
            layer = parent.module._modules.get(self.source)
            if getattr(layer, "activation", None) != self.applied:
                raise RuntimeError(
                    f"{self.original!r} was fused into the layer {self.source!r} before it, where now is a "
                    f"{type(layer).__name__} without it: convert with fuse=False before layers are replaced or wrapped"
                )
        return input

    def extra_repr(self) -> str:
        """What was fused, and where."""
        return f"{self.original!r} in {self.source}"


class _Parent:
    """The module that holds another, which does not hold it in turn: a copy of a part leaves the whole alone."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Parent:
        return _Parent(memo.get(id(self.module), self.module))
