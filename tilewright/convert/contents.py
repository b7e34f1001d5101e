"""What containers and plain objects hold, remembered so that it can be compared and put back."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

#: Types whose values cannot change.
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice)
_CONSTANT = (*PLAIN, torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout)
#: Types that hold nothing where they are empty, and each of which is then as good as any other.
CONTAINERS = (dict, collections.OrderedDict, list, set)
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_MISSING = object()


def is_constant(value: object) -> bool:
    """Whether ``value`` cannot change and holds nothing that could."""
    return isinstance(value, (*_CONSTANT, *_CODE)) or (type(value) is tuple and all(map(is_constant, value)))


def may_hold(value: object) -> bool:
    """Whether ``value`` may hold tensors or modules: most attributes of a module are empty or plain."""
    kind = type(value)
    return kind not in PLAIN and (kind not in CONTAINERS or bool(value))


def is_same(a: object, b: object) -> bool:
    """Whether two values are one, or plain and equal."""
    return a is b or (type(a) is type(b) and isinstance(a, _CONSTANT) and bool(a == b))


def children(value: Any) -> list[Any] | None:
    """What a container or plain object holds; None for anything else, such as tensors and modules."""
    if is_constant(value) or isinstance(value, (torch.Tensor, nn.Module)):
        return None
    if _is_array(value):
        return []
    if isinstance(value, dict):
        return [*value.values(), *_attributes(value)]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return [*value, *_attributes(value)]
    return _attributes(value) if is_plain_object(value) else None


def _attributes(value: Any) -> list[Any]:
    return list(vars(value).values()) if is_plain_object(value) else []


def _is_array(value: Any) -> bool:
    """Whether ``value`` is an array of NumPy, which is known by name, not imported."""
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def is_plain_object(value: Any) -> bool:
    """Whether ``value`` is an object of somebody's own class, whose attributes say what it is."""
    own = not type(value).__module__.startswith(("torch", "tilewright", "builtins"))
    return own and type(getattr(value, "__dict__", None)) is dict


def _held(value: Any) -> Any:
    """A copy of what ``value`` holds itself."""
    items: Any = None
    if _is_array(value):
        items = [value.tobytes()]
    elif isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, set, collections.deque)):
        items = list(value)
    return items, dict(vars(value)) if is_plain_object(value) else None


def modules_in(values: Iterable[Any]) -> set[nn.Module]:
    """The modules to which ``values`` lead through containers and plain objects; not what lies inside of these."""
    found: set[nn.Module] = set()
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, nn.Module):
            found.add(value)
        elif id(value) not in seen and (inner := children(value)):
            seen.add(id(value))
            stack += inner
    return found


def exchanged(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """``value`` with ``new`` wherever ``old`` can be reached in it: written into it, but tuples are made anew."""
    return _exchanged(value, old, new, set())


def _exchanged(value: Any, old: nn.Module, new: nn.Module, seen: set[int]) -> Any:
    if value is old:
        return new
    if id(value) in seen or not children(value):
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        items = [_exchanged(each, old, new, seen) for each in value]
        if any(after is not before for after, before in zip(items, value, strict=True)):
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(value, set) and old in value:
        value.remove(old)
        value.add(new)
    elif isinstance(value, dict):
        _exchange_items(value, list(value.items()), old, new, seen)
    elif isinstance(value, (list, collections.deque)):
        _exchange_items(value, list(enumerate(value)), old, new, seen)
    if is_plain_object(value):
        _exchange_items(vars(value), list(vars(value).items()), old, new, seen)
    return value


def _exchange_items(into: Any, items: list[Any], old: nn.Module, new: nn.Module, seen: set[int]) -> None:
    for key, each in items:
        if (after := _exchanged(each, old, new, seen)) is not each:
            into[key] = after


class Contents:
    """What can be reached from ``roots`` through containers and plain objects, as it is now. deep: not only at once."""

    def __init__(self, roots: Iterable[Any], deep: bool = True):
        self._seen: dict[int, tuple[Any, Any]] = {}
        stack = list(roots)
        while stack:
            value = stack.pop()
            inner = None if id(value) in self._seen else children(value)
            if inner is not None:
                self._seen[id(value)] = value, _held(value)
                stack += inner if deep else ()

    def changed(self) -> list[Any]:
        """The containers and objects that hold something else now."""
        return [value for value, held in self._seen.values() if not _equal(held, _held(value))]

    def restore(self) -> None:
        """Put back what was there."""
        for value, (items, attributes) in self._seen.values():
            if _equal((items, attributes), _held(value)):
                continue
            if _is_array(value):
                value[...] = type(value)(value.shape, value.dtype, items[0])
            elif isinstance(value, dict):
                value.clear()
                value.update(items)
            elif isinstance(value, list):
                value[:] = items
            elif items is not None:
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(items)
            if attributes is not None:
                restore_dict(vars(value), attributes)


def _equal(a: Any, b: Any) -> bool:
    (items, attributes), (other_items, other_attributes) = a, b
    if (items is None) != (other_items is None) or (attributes is None) != (other_attributes is None):
        return False
    if items is not None and not _same_items(items, other_items):
        return False
    return attributes is None or not changed_keys(attributes, other_attributes)


def _same_items(a: list[Any], b: list[Any]) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        pairs = zip(x, y, strict=True) if type(x) is tuple and type(y) is tuple and len(x) == len(y) else ((x, y),)
        if not all(is_same(one, other) for one, other in pairs):
            return False
    return True


def changed_keys(before: dict[Any, Any], after: dict[Any, Any]) -> list[Any]:
    """Keys of which ``after`` has another value, one more or one fewer."""
    return [key for key in {**before, **after} if not is_same(before.get(key, _MISSING), after.get(key, _MISSING))]


def restore_dict(current: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Make ``current`` hold what ``before`` does, and write nothing where it does already."""
    for key in changed_keys(before, current):
        if key in before:
            current[key] = before[key]
        else:
            del current[key]
