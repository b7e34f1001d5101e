"""The cache of keys and values that a decoder's block is given, in a graph: an object that is asked to take more of
them and gives all that it holds.

What a cache does is its own: a graph shows its ``update`` as one call, on whatever cache a call brings along. Code that
asks anything else of its cache is not read.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tilewright.convert.graph.cache_room import room_for
from tilewright.convert.graph.values import Value
from tilewright.kernels.cpu.recording import of_holder


class HeldCache:
    """``cache`` as an input of a graph. layers: those that the graph updates. For PyTorch's trees, its leaves are what
    these layers hold, so that a copy of a tree has a cache of its own.
    """

    def __init__(self, cache: Any, layers: tuple[int, ...] = ()):
        self.cache, self.layers = cache, layers
        self._inference = torch.is_inference_mode_enabled()

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        """What the cache gives, in the mode of whoever has brought it."""
        if torch.is_inference_mode_enabled() == self._inference:
            return self.cache.update(key, value, layer, *args, **kwargs)
        with torch.inference_mode(self._inference):
            return self.cache.update(key, value, layer, *args, **kwargs)


class ExampleCache(HeldCache):
    """A cache that may be asked any number of times, since nothing is written to it."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        """What the cache would give."""
        return twin_of(self.cache, (layer,)).update(key, value, layer, *args, **kwargs)


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache of transformers that consists of layers."""
    base = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return base is not None and isinstance(value, base) and isinstance(vars(value).get("layers"), list)


def twin_of(cache: Any, layers: Collection[int], memo: dict[int, Any] | None = None) -> Any:
    """A cache whose updates of these layers ``cache`` does not see; the others are shared. memo: what else a copy holds
    in place of what.
    """
    shared = {id(layer): layer for i, layer in enumerate(cache.layers) if i not in layers}
    return copy.deepcopy(cache, shared | (memo or {}))


def _room_in(
    held: HeldCache, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    if args or kwargs or torch.is_inference_mode_enabled() != held._inference:
        return None
    return room_for(held.cache, layer, key, value)


@of_holder(_room_in)
def update_cache(cache: HeldCache, key: Any, value: Any, layer: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """The ``update`` of a cache: it takes the keys and values of a layer, and gives all of its."""
    return tuple(cache.update(key, value, layer, *args, **kwargs))


class CacheValue(Value):
    """Stands for a ``HeldCache``."""

    def update(self, key: Any, value: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the graph."""
        return self.tracer.create_proxy("call_function", update_cache, (self, key, value, layer, *args), kwargs)

    def __getattr__(self, name: str) -> Any:
        self.tracer.refuse(f"forward asks its cache for {name!r}")


@dataclass(frozen=True)
class _Whole:
    """Beside the tensors, what a ``HeldCache`` is made of."""

    held: HeldCache
    names: tuple[tuple[int, str], ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Whole):
            return False
        return type(other.held.cache) is type(self.held.cache) and other.names == self.names

    __hash__ = None  # type: ignore[assignment]


def _flatten(held: HeldCache) -> tuple[list[torch.Tensor], _Whole]:
    layers = held.cache.layers
    found = {
        (i, name): value
        for i in held.layers
        if i < len(layers)
        for name, value in vars(layers[i]).items()
        if isinstance(value, torch.Tensor)
    }
    return list(found.values()), _Whole(held, tuple(found))


def _unflatten(tensors: Iterable[torch.Tensor], whole: _Whole) -> HeldCache:
    held, layers = whole.held, whole.held.cache.layers
    memo = {id(vars(layers[i])[name]): tensor for (i, name), tensor in zip(whole.names, tensors, strict=True)}
    made = HeldCache(twin_of(held.cache, held.layers, memo), held.layers)
    made._inference = held._inference
    return made


pytree.register_pytree_node(HeldCache, _flatten, _unflatten)
