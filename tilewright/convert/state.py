"""What the modules of a model hold beside weights, remembered while the model runs on sample inputs, and put back."""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tilewright.convert.code import is_somebodys
from tilewright.convert.contents import Contents, changed_keys, children, restore_dict
from tilewright.convert.outside import Outside
from tilewright.convert.structure import memory_extent
from tilewright.convert.text import display_name
from tilewright.kernels.dispatch.same import version_of

logger = logging.getLogger("tilewright")

#: Of each larger tensor no copy is kept; that it was written to is then said, not undone.
MOST_BYTES = 64 * 2**20
#: Up to this size a tensor is compared with its copy, whatever PyTorch counted: it does not see writes by ``.data``.
_ALWAYS_COMPARED = 2**16
_TABLES = ("_parameters", "_buffers", "_modules")
#: Attributes of every module.
_INTERNAL = frozenset(vars(nn.Module()))


class HeldState:
    """What ``model`` holds now, but for PyTorch's own layers and ours, which in eval mode write nothing.

    That is every attribute, what lies in lists, dictionaries and plain objects, the values of tensors, and what the
    code may write outside of the model.
    """

    def __init__(self, model: nn.Module):
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        roots: list[Any] = []
        tensors: dict[int, tuple[str, torch.Tensor]] = {}
        for path, module in model.named_modules():
            if not is_somebodys(module):
                continue
            state = vars(module)
            held = [state, *(state[name] for name in _TABLES if type(state.get(name)) is dict)]
            self._tables += [(table, dict(table)) for table in held]
            own = [value for name, value in state.items() if name not in _TABLES and "_hooks" not in name]
            roots += own
            stack = [*own, *(value for table in held[1:] for value in table.values())]
            seen: set[int] = set()
            while stack:
                value = stack.pop()
                if isinstance(value, torch.Tensor):
                    tensors.setdefault(id(value), (path, value))
                elif id(value) not in seen:
                    seen.add(id(value))
                    stack += children(value) or ()
        self._contents, self._outside = Contents(roots), Outside(model.modules())
        self._tensors = [_Kept(path, tensor) for path, tensor in tensors.values() if _has_values(tensor)]

    def changed(self) -> bool:
        """Whether something was written since."""
        tables = any(changed_keys(before, table) for table, before in self._tables)
        held = bool(self._contents.changed()) or any(kept.changed() for kept in self._tensors)
        return tables or held or bool(self._outside.changed())

    def restore(self) -> None:
        """Put it all back."""
        for table, before in self._tables:
            restore_dict(table, before)
        self._contents.restore()
        self._outside.restore()
        for kept in self._tensors:
            kept.restore()


def _has_values(tensor: torch.Tensor) -> bool:
    return type(tensor.data) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_meta


class _Kept:
    """One tensor and its values."""

    def __init__(self, path: str, tensor: torch.Tensor):
        self.path, self.tensor, self.version = path, tensor, version_of(tensor)
        self.memory = tensor.detach()
        self.bytes = tensor.numel() * tensor.element_size()
        self.values = self.memory.clone() if self.bytes <= MOST_BYTES else None

    def _moved(self) -> bool:
        return self.tensor.data_ptr() != self.memory.data_ptr() or self.tensor.shape != self.memory.shape

    def _written(self) -> bool:
        counted = self.version < 0 or version_of(self.tensor) != self.version
        if self.values is None or not (counted or self.bytes <= _ALWAYS_COMPARED):
            return counted
        return not _identical(self.memory, self.values)

    def changed(self) -> bool:
        return self._moved() or self._written()

    def restore(self) -> None:
        tensor = self.tensor
        if self._moved():
            tensor.data = self.memory
        if self._written():
            if self.values is None:
                name, size = display_name(self.path), self.bytes >> 20
                logger.warning("%r has written to a tensor of %d MiB that it holds, which stays so", name, size)
            else:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(self.values)
        self.version = version_of(tensor)


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes: NaN is NaN."""
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (a, b)))


def private_twin(model: nn.Module) -> nn.Module | None:
    """A module that runs as ``model`` does and writes to nothing that this holds, which other threads may use. None
    where something cannot be copied. Large tensors are shared, and what PyTorch's own layers and ours hold, which in
    eval mode write nothing.
    """
    memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module in model.modules()}
    try:
        for module in model.modules():
            held, twin = vars(module).copy(), memo[id(module)]  # in one step: other threads may add attributes
            own = {name: value for name, value in held.items() if name not in _INTERNAL and name != "forward"}
            vars(twin).update(held)
            vars(twin)["_modules"] = {name: memo.get(id(part), part) for name, part in held["_modules"].items()}
            if _writes_nothing(module):
                continue
            for name in ("_parameters", "_buffers"):
                own[name] = held[name].copy()
            _share_what_is_large(own, memo)
            vars(twin).update(copy.deepcopy(own, memo))
    except Exception as error:
        logger.debug("%s has no twin: %s", type(model).__name__, error)
        return None
    found: nn.Module = memo[id(model)]
    return found


def _share_what_is_large(tree: Any, memo: dict[int, Any]) -> None:
    """Have a copy of ``tree`` hold the same large tensors, and the same modules where they have no twin."""
    stack, seen = [tree], set[int]()
    while stack:
        value = stack.pop()
        large = isinstance(value, torch.Tensor) and value.numel() * value.element_size() > MOST_BYTES
        if large or isinstance(value, nn.Module):
            memo.setdefault(id(value), value)
        elif id(value) not in seen:
            seen.add(id(value))
            stack += children(value) or ()


def _writes_nothing(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.", "tilewright."))


def private_copy(tree: Any) -> Any:
    """``tree`` with tensors of its own. Those that share memory do so in the copy as well."""
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    storages = collections.Counter(extent[0] for tensor in tensors if (extent := memory_extent(tensor)) is not None)
    copies: dict[Any, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        extent = memory_extent(tensor)
        if extent is None or storages[extent[0]] == 1:
            return tensor.detach().clone()
        if extent[0] not in copies:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            copies[extent[0]] = whole.clone()
        typed = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return typed.set_(copies[extent[0]].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    return pytree.tree_map_only(torch.Tensor, copied, tree)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """What is drawn from PyTorch's generators while this is open is drawn again afterwards.

    So is what other threads draw meanwhile: the generators are of the whole process.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = [torch.cuda.get_rng_state(device) for device in devices]
    state = torch.get_rng_state()
    try:
        yield
    finally:
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
        for device, before in zip(devices, states, strict=True):
            torch.cuda.set_rng_state(before, device)
