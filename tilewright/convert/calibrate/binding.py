"""Binding an item of the data to what the ``forward`` of a model takes, and words for what does not fit.

``forward`` says by its signature what of an item it takes: a label beside an image is left out, and so are keys that it
has no argument for.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from tilewright.convert.text import listed

logger = logging.getLogger("tilewright")

#: Runs a model on an item, in place of ``model(item)``.
ForwardFunction = Callable[[nn.Module, Any], Any]
#: So many tensors alike, of which ``forward`` takes fewer, are no input with its labels.
_MANY_ALIKE = 4
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_MAKES = "transform= takes the function that makes tensors of an item"


@dataclass(frozen=True)
class Sample:
    """An item that a function of the user's runs a model on."""

    item: Any
    forward_fn: ForwardFunction


def arguments(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a mapping has keyword arguments, a tuple or list positional ones, else it is one."""
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)) and not isinstance(item, PackedSequence):
        return tuple(item), {}
    return (item,), {}


class Binder:
    """Binds items to the ``forward`` of a model. called: the argument of ours that holds the items."""

    def __init__(self, model: nn.Module, called: str):
        self.called = called
        signature = _signature(model)
        self.parameters = None if signature is None else list(signature.parameters.values())
        self.forward = f"{type(model).__name__}.forward({_shown(self.parameters)})"
        tensors = [*model.parameters(), *model.buffers()]
        self.device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
        floats = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        self.dtype = floats[0] if floats else torch.get_default_dtype()
        self.convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self._told = False

    # ---- what forward takes
    def bound(self, item: Any, where: str) -> Any:
        """What ``forward`` takes of ``item``, in a form that ``arguments`` reads, with tensors in place of arrays."""
        args, kwargs = arguments(item)
        args, kwargs = tuple(map(self.tensors, args)), {key: self.tensors(each) for key, each in kwargs.items()}
        if self.parameters is not None and isinstance(item, Mapping):
            args, kwargs = self._by_name(self.parameters, kwargs, where)
        elif self.parameters is not None:
            args = self._by_position(self.parameters, args, where)
        self.check_values(args, kwargs, where)
        if isinstance(item, Mapping) and not args:
            return kwargs
        return args[0] if len(args) == 1 and not isinstance(args[0], (Mapping, tuple, list)) else args

    def _by_name(
        self, parameters: list[inspect.Parameter], item: dict[Any, Any], where: str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = [each for each in parameters if each.kind not in (*_VARIADIC, inspect.Parameter.POSITIONAL_ONLY)]
        known = {each.name: item[each.name] for each in named if each.name in item}
        missing = [each.name for each in named if _required(each) and each.name not in known]
        has = f"{where} has the keys {listed(list(map(str, item)))}"
        if missing and (known or len(missing) > 1):
            raise TypeError(f"{has}: {self.forward} needs {listed(missing)} too")
        if missing:
            return (item,), {}  # the one argument is a dict, as of a SentenceTransformer
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
            return (), item
        if item and not known:
            raise TypeError(f"{has}, of which {self.forward} takes none")
        self._leave_out([repr(key) for key in item if key not in known])
        return (), known

    def _by_position(self, parameters: list[inspect.Parameter], args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
        positional = [each for each in parameters if each.kind in _BY_POSITION]
        unnamed = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
        gives = f"{where} gives {len(args)} argument{'s' * (len(args) != 1)}"
        if missing := [each.name for each in [*positional[len(args) :], *unnamed] if _required(each)]:
            raise TypeError(f"{gives}: {self.forward} needs {listed(missing)} too")
        for place, (parameter, value) in enumerate(zip(positional, args, strict=False)):
            if _is_flag(parameter) and _is_label(value, args[0]):
                self._leave_out([f"value {place + 1} of {len(args)}"])
                return args[:place]
        if any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters) or len(args) <= len(positional):
            return args
        if not positional or (len(args) >= _MANY_ALIKE and _alike(args)):
            raise TypeError(
                f"{gives}, {self.forward} takes {len(positional)}: torch.stack makes a batch of tensors, and a list "
                "within a tuple is one argument"
            )
        self._leave_out([f"value {place} of {len(args)}" for place in range(len(positional) + 1, len(args) + 1)])
        return args[: len(positional)]

    def _leave_out(self, names: list[str]) -> None:
        if names and not self._told:
            self._told = True
            logger.info("%s: %s has no place for %s of an item", self.called, self.forward, ", ".join(names))

    def tensors(self, value: Any) -> Any:
        """``value`` with tensors in place of arrays: floats in the dtype of the model, all on its device."""
        if is_array(value):
            if value.dtype.kind not in "biufc":
                return value
            tensor = torch.from_numpy(value.copy())
            return tensor.to(self.device, self.dtype if value.dtype.kind == "f" else tensor.dtype)
        if type(value) in (list, tuple):
            return type(value)(map(self.tensors, value))
        return {key: self.tensors(each) for key, each in value.items()} if type(value) is dict else value

    def check_values(self, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
        """Refuse NaN, and Inf but for the -Inf that masks are made of; and tensors all of which are empty."""
        tensors = [
            (f"{where}, argument {place!r}", tensor)
            for name, value in self._named(args, kwargs).items()
            for place, tensor in _tensors_in(name, value)
            if tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
        ]
        for place, tensor in tensors:
            for word, wrong in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
                if not tensor.is_floating_point() or (word == "-Inf" and "mask" in place):
                    continue
                if count := int(wrong(tensor).sum()):
                    raise ValueError(f"{place}: {count} of {tensor.numel()} values are {word}")
        if tensors and not any(tensor.numel() for _, tensor in tensors):
            raise ValueError(f"{tensors[0][0]}: a tensor of shape {list(tensors[0][1].shape)} holds nothing")

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = [each.name for each in self.parameters or () if each.kind in _BY_POSITION]
        places = itertools.zip_longest(args, names[: len(args)])
        return {name or f"number {index}": value for index, (value, name) in enumerate(places)} | kwargs

    # ---- what went wrong
    def explained(self, error: Exception, item: Any, where: str) -> Exception:
        """An error that names the item, for one that running the model on it raised: of the same kind, if that is a
        ValueError or a TypeError, else a RuntimeError.
        """
        said = f"{type(error).__name__}: {error}"
        if str(error).startswith(where):
            said = str(error)
        elif isinstance(item, Sample):
            said = f"{where}: forward_fn raised {said}; it was given {in_words(item.item)}"
        else:
            given = self._named(*arguments(item))
            shown = ", ".join(f"{name}={_short(value)}" for name, value in given.items())
            unusual = next((each for name, value in given.items() if (each := self._unusual(name, value))), "")
            values = list(given.values())
            if not unusual and any(_is_label(value, values[0]) for value in values[1:]):
                unusual = "If a label is among its values: transform=lambda item: item[0] leaves it out"
            if len(given) > 1 and all(isinstance(value, numbers.Number) for value in values):
                unusual = "A list gives its values one by one: torch.tensor makes one argument of numbers"
            said = f"{where}: {self.forward} raised {said}; it was called with {shown}{unusual and f'. {unusual}'}"
        return same_kind(error)(said)

    def _unusual(self, name: str, value: Any) -> str:
        """What of an argument may be why the model did not take it."""
        argument = f"Argument {name!r} is"
        if isinstance(value, torch.Tensor):
            if value.device != self.device:
                return f"{argument} on {value.device}, the model on {self.device}: move it there"
            if value.dtype != self.dtype and (value.is_floating_point() or value.dtype == torch.uint8):
                return f"{argument} {_dtype(value.dtype)}, the model {_dtype(self.dtype)}: cast it"
            if self.convolves and value.dim() == 3:
                return (
                    f"{argument} an image without a batch: a DataLoader makes batches, and [tensor] is a single input"
                )
            is_row = value._base is not None and value._base.dim() == value.dim() + 1
            return f"{argument} a row of a tensor: [tensor] is a single input" if is_row else ""
        if isinstance(value, Mapping):
            return f"{argument} {in_words(value)}: transform=lambda item: item[...] says what of it the model takes"
        leaves = list(_leaves(value))
        if leaves and all(isinstance(each, str) for each in leaves):
            return f"{argument} text: {_MAKES}, such as lambda text: tokenizer(text, return_tensors='pt')"
        if any(type(each).__module__.startswith("PIL.") for each in leaves):
            return f"{argument} a PIL image: {_MAKES}, as an image processor does"
        if isinstance(value, (list, tuple)):
            if leaves and all(isinstance(each, numbers.Number) for each in leaves):
                return (
                    f"{argument} a list of numbers: torch.tensor makes a tensor of it, return_tensors='pt' a tokenizer"
                )
            return ""
        return f"{argument} {in_words(value)}, no tensor: {_MAKES}" if value is not None else ""


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def same_kind(error: Exception) -> type[Exception]:
    """The class of an error that says more than ``error`` does, for those who catch that."""
    return next((kind for kind in (ValueError, TypeError) if isinstance(error, kind)), RuntimeError)


def in_words(value: Any) -> str:
    """What ``value`` is."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (str, bytes, numbers.Number, type(None), os.PathLike)):
        return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:56]} ..."
    if isinstance(value, Mapping):
        return f"a dict with the keys {listed(list(map(str, value)))}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIO' else 'a'} {kind}"


def _signature(model: nn.Module) -> inspect.Signature | None:
    """What ``forward`` takes; of a module that hands on whatever it is given, that of the one inside."""
    found: list[inspect.Signature] = []
    module: nn.Module | None = model
    while module is not None:
        for forward, skipped in ((module.forward, 0), (type(module).forward, 1)):
            try:
                signature = inspect.signature(forward)
            except (TypeError, ValueError):
                continue
            parameters = list(signature.parameters.values())[skipped:]
            if not parameters or not all(each.kind in _VARIADIC for each in parameters):
                return signature.replace(parameters=parameters)
            found.append(signature)
        inside: Iterable[str] = ("module", "base_model", "model")
        module = next((module._modules[name] for name in inside if module._modules.get(name) is not None), None)
    return found[0] if found else None


def _shown(parameters: list[inspect.Parameter] | None) -> str:
    """``x, mask=None``, without annotations; of many, the first."""
    if parameters is None:
        return "..."
    plain = [str(each.replace(annotation=inspect.Parameter.empty)) for each in parameters]
    return ", ".join(plain if len(plain) < 6 else [*plain[:4], "..."])


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _is_flag(parameter: inspect.Parameter) -> bool:
    """Whether an argument that may be left away is a mask or a switch, and so none that labels could be meant for."""
    says = "mask" in parameter.name or "bool" in str(parameter.annotation) or isinstance(parameter.default, bool)
    return says and not _required(parameter)


def _is_label(value: Any, beside: Any) -> bool:
    """Whether ``value`` is an integer for each row of ``beside``, or one integer."""
    if not isinstance(value, torch.Tensor) or not isinstance(beside, torch.Tensor):
        return isinstance(value, int) and not isinstance(value, bool)
    whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
    return whole and beside.dim() > 1 and value.shape in ((), beside.shape[:1])


def _alike(values: tuple[Any, ...]) -> bool:
    return len({(each.shape, each.dtype) if isinstance(each, torch.Tensor) else id(each) for each in values}) == 1


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an argument, each with what it is called."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors_in(f"{name}[{key!r}]", each)
    elif isinstance(value, (tuple, list)):
        for index, each in enumerate(value):
            yield from _tensors_in(f"{name}[{index}]", each)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return f"{_dtype(value.dtype)}{list(value.shape)}"
    return in_words(value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
