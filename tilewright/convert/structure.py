"""What the converter knows about a whole model: copying its structure, swapping modules, tied memory, output heads."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tilewright.convert.code import is_somebodys, may_write
from tilewright.convert.contents import CONTAINERS, exchanged, may_hold, modules_in
from tilewright.convert.text import display_name

#: Direct children of the root with one of these names count as output heads.
HEAD_NAMES = ("lm_head", "head", "score", "classifier", "qa_outputs", "embed_out", "output_projection")


class ReplacedForward:
    """Base of what the converter puts in place of a ``forward``, by which it is recognised.

    owner: the module whose it is. refused: why it is not used any more; None while it is.
    """

    owner: nn.Module
    refused: str | None = None

    @property
    def __code__(self) -> Any:
        # torch.export looks where the code of a forward lies.
        return inspect.unwrap(type(self.owner).forward).__code__

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = inspect.signature(type(self.owner).forward).parameters.values()
        return inspect.Signature(list(parameters)[1:])


def copy_structure(model: nn.Module) -> nn.Module:
    """A copy of the model with modules of its own that hold the *same* parameters, buffers and tensor attributes.

    Only what a ``forward`` may write to is its own, as far as the names in its code tell: a counter, running
    statistics. Raises TypeError if the model holds something that cannot be copied.
    """
    written = _written_in_forward(model)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model) if id(tensor) not in written}
    for module in model.modules():
        # Nine hooks' dictionaries a module, nearly all empty, take deepcopy longer than all else.
        memo.update((id(each), type(each)()) for each in vars(module).values() if type(each) in CONTAINERS and not each)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(f"{type(model).__name__} cannot be copied ({error}); inplace=True needs no copy") from error


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that a module of the model holds, in containers of its attributes too."""
    for module in model.modules():
        yield from _tensors_in(vars(module))


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            stack.extend(filter(may_hold, value.values()))
        elif isinstance(value, (list, tuple)):
            stack.extend(value)


def _written_in_forward(model: nn.Module) -> set[int]:
    """``id`` of the tensors, no parameters, that a forward may write to, and that share memory with no other."""
    written: set[int] = set()
    for module in filter(is_somebodys, model.modules()):
        for name, value in [*vars(module).items(), *module._buffers.items()]:
            if may_hold(value) and name not in ("_parameters", "_buffers", "_modules"):
                found = [each for each in _tensors_in(value) if each.is_leaf and not isinstance(each, nn.Parameter)]
                if found and may_write(type(module), name):
                    written.update(map(id, found))
    others = {_storage(each) for each in _tensors(model) if id(each) not in written} if written else set()
    return {id(each) for each in _tensors(model) if id(each) in written and _storage(each) not in others}


def _storage(tensor: torch.Tensor) -> object:
    extent = memory_extent(tensor)
    return id(tensor) if extent is None else extent[0]


class Ledger:
    """Counts the memory that tensors lie on, each byte once, whichever of them is counted first."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._others: dict[int, torch.Tensor] = {}  # held, so that no id is given twice

    def add(self, tensor: torch.Tensor) -> int:
        """Bytes of ``tensor`` on which none of the tensors before it lies."""
        return sum(self._add(part) for part in _plain_parts(tensor))

    def _add(self, tensor: torch.Tensor) -> int:
        extent = None if tensor.is_nested else memory_extent(tensor)
        if extent is None:
            known = id(tensor) in self._others
            self._others[id(tensor)] = tensor
            return 0 if known or nn.parameter.is_lazy(tensor) else tensor.numel() * tensor.element_size()
        storage, begin, end = extent
        apart, found = [], end - begin
        for start, stop in self._seen.get(storage, []):
            if stop < begin or start > end:
                apart.append((start, stop))
            else:
                found -= max(0, min(stop, extent[2]) - max(start, extent[1]))
                begin, end = min(begin, start), max(end, stop)
        self._seen[storage] = [*apart, (begin, end)]
        return found


def _plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the values of one that is sparse or of a subclass; any other is its own only part."""
    if nn.parameter.is_lazy(tensor):
        return
    if tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif hasattr(tensor.data, "__tensor_flatten__"):
        names, _ = tensor.data.__tensor_flatten__()
        for name in names:
            yield from _plain_parts(getattr(tensor.data, name))
    else:
        yield tensor


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module, shared ones once."""
    ledger = Ledger()
    tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    return sum(ledger.add(tensor) for table in tables for tensor in table.values() if tensor is not None)


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all names it goes by; a shared module has more than one."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def trains(model: nn.Module) -> bool:
    """Whether the model is in training mode, or a part of it whose mode is known to matter is."""
    matters = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
    return model.training or any(module.training for module in model.modules() if isinstance(module, matters))


def held_beside(module: nn.Module) -> dict[str, set[nn.Module]]:
    """Modules that somebody's module holds without registering them, in a list or an object: by the attribute."""
    if not is_somebodys(module):
        return {}
    tables = ("_parameters", "_buffers", "_modules")
    held = {name: value for name, value in vars(module).items() if may_hold(value)}
    names = (name for name in held if name not in tables and "_hooks" not in name)
    return {name: found for name in names if (found := modules_in([held[name]]))}


class Places:
    """A model and where each of its modules is registered, or held beside. root: the model, which a replacement may
    change.
    """

    def __init__(self, root: nn.Module):
        self.root = root
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        self._beside: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in root.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(child, []).append((parent, name))
            for name, children in held_beside(parent).items():
                for child in children:
                    self._beside.setdefault(child, []).append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` stands, and keep no hold of ``old``."""
        places = self._places.pop(old, [])
        for parent, name in places:
            setattr(parent, name, new)
        self._places[new] = places
        beside = self._beside.pop(old, [])
        for owner, name in beside:
            vars(owner)[name] = exchanged(vars(owner)[name], old, new)
        self._beside[new] = beside
        if old is self.root:
            self.root = new


def tied_to(model: nn.Module) -> dict[int, str]:
    """Parameters and buffers that share memory with one of another name: ``id`` of the tensor -> that other name.

    The same tensor in two modules counts, and so do two tensors whose memory overlaps, such as a view and its base. A
    module that is registered twice is not tied to itself.
    """
    extents: list[tuple[tuple[str, int], int, int, str, torch.Tensor, nn.Module]] = []
    for module_name, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            extent = memory_extent(tensor)
            if tensor is not None and extent is not None:
                extents.append((*extent, f"{module_name}.{name}".lstrip("."), tensor, module))
    extents.sort(key=lambda entry: (entry[0], entry[1], -entry[2]))
    tied: dict[int, str] = {}
    widest = None
    for entry in extents:
        storage, begin, end, name, tensor, module = entry
        if widest is not None and widest[0] == storage and begin < widest[2]:
            if module is not widest[5]:
                tied.setdefault(id(tensor), widest[3])
                tied.setdefault(id(widest[4]), name)
            if end <= widest[2]:
                continue
        widest = entry
    return tied


def memory_extent(tensor: torch.Tensor | None) -> tuple[tuple[str, int], int, int] | None:
    """Where a tensor's elements lie: (device and storage, first byte, byte after the last). None without memory."""
    if tensor is None or nn.parameter.is_lazy(tensor) or not tensor.numel() or tensor._is_zerotensor():
        return None
    if tensor.device.type == "meta" or tensor.layout != torch.strided or type(tensor.data) is not torch.Tensor:
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * tensor.element_size()
    storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
    return storage, begin, begin + (int(last) + 1) * tensor.element_size()


def output_heads(model: nn.Module) -> dict[nn.Module, str]:
    """Output heads, each with how it was recognised.

    A head is what ``get_output_embeddings()`` of the model or of a part of it returns (Hugging Face), or a direct
    child of the root called as in ``HEAD_NAMES``.
    """
    heads: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        try:
            head = getter()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(head, nn.Module):
            heads.setdefault(head, f"get_output_embeddings() of {display_name(name)} returns it")
    for name in HEAD_NAMES:
        child = model._modules.get(name)
        if child is not None:
            heads.setdefault(child, f"it is the root's {name!r}")
    return heads


class FastPaths:
    """PyTorch's native encoder layer, which reads the weights of ``linear1`` and ``linear2`` instead of calling them.

    ``nn.TransformerEncoderLayer`` decides by its attribute ``activation_relu_or_gelu`` (0: no native path),
    ``nn.TransformerEncoder`` by ``use_nested_tensor``. Both are plain attributes: they follow the module through
    deepcopy and pickling. What they were is kept beside them under ``saved``.
    """

    saved = "_tilewright_fast_path"
    switches: Mapping[type[nn.Module], tuple[str, Any]] = {
        nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
        nn.TransformerEncoder: ("use_nested_tensor", False),
    }

    @classmethod
    def close(cls, model: nn.Module, converted: Callable[[nn.Module], bool]) -> None:
        """Switch the native path off wherever a converted layer lies inside."""
        for module in model.modules():
            for kind, (attribute, off) in cls.switches.items():
                if isinstance(module, kind) and hasattr(module, attribute) and any(map(converted, module.modules())):
                    vars(module).setdefault(cls.saved, getattr(module, attribute))
                    setattr(module, attribute, off)

    @classmethod
    def open(cls, model: nn.Module) -> None:
        """Undo ``close``."""
        for module in model.modules():
            for kind, (attribute, _) in cls.switches.items():
                if isinstance(module, kind) and cls.saved in vars(module):
                    setattr(module, attribute, vars(module).pop(cls.saved))
