"""Sample inputs as people have them: batches of a DataLoader, what a tokenizer returns, arrays, sentences."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tilewright.convert.calibrate.binding import Binder, ForwardFunction, Sample, in_words, is_array, same_kind

#: The argument whose tensors and arrays are an iterable of their rows.
CALIBRATION_DATA = "calibration_data"
#: Makes a model's input of an item of the data.
Transform = Callable[[Any], Any]


def samples(
    model: nn.Module,
    data: Any,
    called: str = CALIBRATION_DATA,
    transform: Transform | None = None,
    forward_fn: ForwardFunction | None = None,
) -> Iterator[Any]:
    """The items of ``data`` as inputs of ``model``, in forms that ``call`` takes, one after the other.

    data: an iterable; a mapping by itself is one item. called: the name of the argument that it is; of all but
        calibration_data, a tensor or an array by itself is one item too.
    transform: is given each item, and returns the input. forward_fn: runs the model on what ``transform`` returns;
        nothing is then bound to the signature of ``forward``.

    Raises TypeError or ValueError, which name ``called``, the index of the item and the argument: for what is no data,
    for an item that lacks an argument, for NaN or Inf.
    """
    for name, function in (("transform", transform), ("forward_fn", forward_fn)):
        if function is not None and (not callable(function) or isinstance(function, type)):
            raise TypeError(f"{name} is a function, not {in_words(function)}")
    binder = Binder(model, called)
    if is_array(data) and transform is None and forward_fn is None:
        data = binder.tensors(data)
    return _samples(binder, _items(data, called), transform, forward_fn)


def _samples(
    binder: Binder, items: Iterable[Any], transform: Transform | None, forward_fn: ForwardFunction | None
) -> Iterator[Any]:
    for index, item in enumerate(items):
        where, found = f"{binder.called}, item {index}", item
        if isinstance(item, Sample):
            yield item
            continue
        if transform is not None:
            try:
                found = transform(item)
            except Exception as error:
                said = f"transform raised {type(error).__name__}: {error}; it was given {in_words(item)}"
                raise same_kind(error)(f"{where}: {said}") from error
        if found is None:
            raise TypeError(f"{where}{': transform returned' if transform else ' is'} None")
        yield binder.bound(found, where) if forward_fn is None else Sample(found, forward_fn)


def _items(data: Any, called: str) -> Iterable[Any]:
    """The items of ``data``. Raises TypeError for what holds none, ValueError for an empty mapping."""
    if isinstance(data, Mapping) and not data:
        raise ValueError(f"{called} is empty")
    holds_rows = called == CALIBRATION_DATA and getattr(data, "ndim", 0) > 0
    if isinstance(data, Mapping) or ((isinstance(data, torch.Tensor) or is_array(data)) and not holds_rows):
        return [data]
    is_module, hint = isinstance(data, (type, nn.Module)), "one input goes into a list"
    if isinstance(data, (str, bytes, os.PathLike)):
        hint = "load what a path names; sentences go into a list, with transform= for what makes inputs of them"
    elif hasattr(data, "__iter__") and not is_module:
        return iter(data)
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__") and not is_module:
        return (data[index] for index in range(len(data)))  # as datasets are
    elif callable(data) and not is_module:
        hint = "call the function"
    raise TypeError(
        f"{called} takes an iterable of inputs, such as a DataLoader or a list of tensors, not {in_words(data)}: {hint}"
    )
