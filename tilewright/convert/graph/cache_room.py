"""Room behind the keys and values of a cache, so that the next ones are written and nothing else is copied.

A layer of ``DynamicCache`` joins what it has and what is new, a copy of all of it for each token. Here its tensors are
parts of larger ones, and what is new comes behind them, where that cannot be told from joining: nobody but the layer
may look at the memory, by another name, a view or an array. What the layer holds then is what it would hold, but that
the heads do not lie side by side in memory, as after ``crop``.

Only the layers of transformers itself are written to in this way, and only after ``update`` of one like it was seen to
do the same. Every other cache is asked to update itself.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tilewright.kernels.dispatch.same import holds_values

#: What ``room_for`` gives: keys, values, and the position of the first that is to be written.
Room = tuple[torch.Tensor, torch.Tensor, int]
#: What layers have for attributes, beside keys and values, in the versions of transformers that are known.
_COMMON = {"keys", "values", "is_initialized", "dtype", "device"}
_SLIDING = _COMMON | {"sliding_window", "cumulative_length", "_sliding_window_tensor", "record_past"}
_STATIC = _COMMON | {
    *("max_cache_len", "cumulative_length", "max_batch_size", "batch_size", "num_heads", "head_dim"),
    *("k_head_dim", "v_head_dim"),
}
#: What the kernel of attention reads where it lies.
_DTYPES = (torch.float32, torch.bfloat16)
#: Positions that are made room for at least, and the part of those that there are.
_LEAST, _PART = 64, 4
#: The memory that was made here for the keys and the values of a layer.
_made: weakref.WeakKeyDictionary[Any, dict[str, _Memory]] = weakref.WeakKeyDictionary()


def room_for(cache: Any, layer: int, key: torch.Tensor, value: torch.Tensor) -> Room | None:
    """What ``cache.update(key, value, layer)`` gives, [batch, heads, length, width], in which ``key`` and ``value`` are
    still to be written, having changed ``cache`` as that does; or None, having done nothing.
    """
    ours = sys.modules.get("tilewright.convert.graph.int8_cache")
    if ours is not None and type(cache) is ours.Int8Cache:
        return _coded_room(ours, cache, layer, key, value)
    caches = sys.modules.get("transformers.cache_utils")
    if caches is None or type(cache) not in (caches.DynamicCache, caches.StaticCache) or "update" in vars(cache):
        return None
    if vars(cache).get("offloading", True) or not 0 <= layer < len(cache.layers):
        return None
    part = cache.layers[layer]
    way = _ways(caches).get(type(part))
    if way is None or not part.is_initialized or "update" in vars(part):
        return None
    if not _takes(part.keys, key) or not _takes(part.values, value) or part.keys.shape[2] != part.values.shape[2]:
        return None
    if not _is_known((caches, type(cache), type(cache).update, type(part), type(part).update)):
        return None
    return way(part, key, value)


def _takes(old: Any, new: torch.Tensor) -> bool:
    if type(old) is not torch.Tensor or old.dtype not in _DTYPES or old.device.type != "cpu" or old.requires_grad:
        return False
    if old.dtype != new.dtype:
        return False
    shape = old.shape
    if not holds_values(old):
        return False
    return len(shape) == 4 and shape[:2] == new.shape[:2] and shape[3] == new.shape[3] and old.numel() > 0


def _coded_room(ours: Any, cache: Any, layer: int, key: torch.Tensor, value: torch.Tensor) -> Any:
    """``room_for`` a cache of int8 codes: a ``CodedRoom``."""
    part: Any = cache.layers[layer] if 0 <= layer < len(cache.layers) else None
    if type(part) not in (ours.Int8Layer, ours.Int8SlidingLayer) or not part.length or part.device.type != "cpu":
        return None
    if (
        not (part.dtype == key.dtype == torch.float32)
        or vars(cache).keys() & {"update"}
        or vars(part).keys() & {"update", "room"}
    ):
        return None
    for codes, new in zip(part._codes[:2], (key, value), strict=True):
        if codes.shape[:2] != new.shape[:2] or codes.shape[3] != new.shape[3]:
            return None
    return part.room(key.shape[2])


# ---- layers
def _grown(part: Any, key: torch.Tensor, value: torch.Tensor) -> Room | None:
    if not vars(part).keys() <= _COMMON:
        return None
    first = part.keys.shape[2]
    part.keys, part.values = _extended(part, "keys", key), _extended(part, "values", value)
    return part.keys, part.values, first


def _grown_window(part: Any, key: torch.Tensor, value: torch.Tensor) -> Room | None:
    kept = part.sliding_window - 1
    if not vars(part).keys() <= _SLIDING or vars(part).get("record_past") or kept < 1:
        return None
    first = part.keys.shape[2]
    part.cumulative_length += key.shape[2]
    keys, values = _extended(part, "keys", key), _extended(part, "values", value)
    part.keys, part.values = keys[:, :, -kept:, :], values[:, :, -kept:, :]
    return keys, values, first


def _grown_static(part: Any, key: torch.Tensor, value: torch.Tensor) -> Room | None:
    length = vars(part).get("cumulative_length")
    if not vars(part).keys() <= _STATIC or type(length) is not torch.Tensor or length.numel() != 1:
        return None
    first = int(length)
    if first + key.shape[2] > part.keys.shape[2]:
        return None  # it says so itself
    if not torch.is_inference_mode_enabled() and any(x.is_inference() for x in (part.keys, part.values, length)):
        return None  # likewise
    length.add_(key.shape[2])
    for tensor in (part.keys, part.values):
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    return part.keys, part.values, first


def _ways(caches: Any) -> dict[type, Callable[[Any, torch.Tensor, torch.Tensor], Room | None]]:
    """By the kind of layer."""
    known = _ways_of.get(id(caches))
    if known is None:
        names = {"DynamicLayer": _grown, "DynamicSlidingWindowLayer": _grown_window, "StaticLayer": _grown_static}
        known = {getattr(caches, name): way for name, way in names.items() if hasattr(caches, name)}
        _ways_of[id(caches)] = known
    return known


_ways_of: dict[int, dict[type, Callable[[Any, torch.Tensor, torch.Tensor], Room | None]]] = {}


# ---- memory
def _extended(part: Any, name: str, new: torch.Tensor) -> torch.Tensor:
    """The tensor ``name`` of a layer, and behind it room for what is in ``new``."""
    made = _made.setdefault(part, {})
    alone = _names_for(part, name) == _ONE_NAME
    old = vars(part)[name]
    batch, heads, length, width = old.shape
    size = (batch, heads, length + new.shape[2], width)
    if alone and name in made and made[name].has_room(old, size):
        return old.as_strided(size, old.stride())
    room = size[2] + max(_LEAST, size[2] // _PART)
    whole = torch.empty(batch, heads, room, width, dtype=old.dtype)
    whole[:, :, :length] = old
    made[name] = _Memory(StorageWeakRef(whole.untyped_storage()), room)
    return whole.as_strided(size, whole.stride())


class _Memory(NamedTuple):
    """Memory for ``room`` positions of each head, known as long as somebody has it."""

    storage: StorageWeakRef
    room: int

    def has_room(self, old: torch.Tensor, size: tuple[int, ...]) -> bool:
        """Whether ``old`` is a part of it, with room for ``size`` at its end, and nobody else has another part."""
        storage = old.untyped_storage()
        if self.storage.cdata != storage._cdata or old.is_inference() != torch.is_inference_mode_enabled():
            return False
        _, heads, length, width = size
        if old.stride() != (heads * self.room * width, self.room * width, width, 1):
            return False
        if old.storage_offset() + length * width > self.room * width:
            return False
        if sys.getrefcount(storage) != _ONE_STORAGE or _users_of is None:
            return False
        # ``old``, outside of inference mode the whole that it is a part of, and ``storage``.
        return bool(_users_of(storage._cdata) == 2 + old._is_view())


def _names_for(part: Any, name: str) -> int:
    """How many references there are to the tensor, one of them in ``part``."""
    tensor = vars(part)[name]
    return sys.getrefcount(tensor)


def _names_for_storage(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage)


#: How many tensors and other objects of C++ have a storage, of PyTorch's own checks of memory; not in every version.
_users_of: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
#: What the functions above find where nobody else knows the object.
_ONE_STORAGE = _names_for_storage(torch.empty(0))
_ONE_NAME = _names_for(types.SimpleNamespace(keys=torch.empty(0)), "keys")


# ---- the proof
@functools.lru_cache(maxsize=64)
def _is_known(kinds: tuple[Any, ...]) -> bool:
    """Whether caches and layers hold and give, token by token, what is made here. kinds: transformers' module, the
    class of a cache, its ``update``, the class of a layer, its ``update``.
    """
    caches, cache_type, _, layer_type, _ = kinds
    way = _ways(caches)[layer_type]
    try:
        theirs, ours = (_small_cache(cache_type, layer_type) for _ in range(2))
        for number, count in enumerate((2, 1, 1, 2, 1)):
            key = torch.arange(2.0 * 3 * count * 4).view(2, 3, count, 4) + 100 * number
            expected = theirs.update(key, -key, 0)
            part = ours.layers[0]
            if not part.is_initialized:
                ours.update(key, -key, 0)
                continue
            found = way(part, key, -key)
            if found is None:
                return False
            keys, values, first = found
            keys[:, :, first : first + count], values[:, :, first : first + count] = key, -key
            if not (torch.equal(keys, expected[0]) and torch.equal(values, expected[1])):
                return False
            if not _is_same(vars(part), vars(theirs.layers[0])):
                return False
    except Exception:  # of a version that makes them in another way
        return False
    return True


def _small_cache(cache_type: Any, layer_type: Any) -> Any:
    sizes = {"sliding_window": 4, "max_cache_len": 9}
    given = {name: size for name, size in sizes.items() if name in inspect.signature(layer_type.__init__).parameters}
    cache = cache_type.__new__(cache_type)
    vars(cache).update(layers=[layer_type(**given)], layer_class_to_replicate=None, offloading=False)
    return cache


def _is_same(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)

    return mine.keys() == theirs.keys() and all(equal(mine[name], theirs[name]) for name in mine)
