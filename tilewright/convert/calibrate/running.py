"""Running a model on sample inputs, and hearing what reaches its layers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tilewright.convert.calibrate.binding import Binder, Sample, arguments
from tilewright.convert.state import HeldState, private_copy, same_random_numbers

#: Is told of every call of a layer: its name, what it is called with by position, and by keyword.
Listener = Callable[[str, tuple[Any, ...], dict[str, Any]], None]


@contextlib.contextmanager
def listening(layers: Mapping[str, nn.Module], listener: Listener) -> Iterator[None]:
    """While this is open, ``listener`` hears of every call of ``layers``, before it is made."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: listener(name, args, kwargs)

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook_for(name), with_kwargs=True).remove)
        yield


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, or None."""
    return args[0] if args else next(iter(kwargs.values()), None)


def run(model: nn.Module, data: Iterable[Any], called: str = "calibration_data") -> int:
    """Run ``model`` on every item of ``data`` (see ``call``), as in ``evaluation``. What its forward writes, the next
    call finds.

    Returns how many there were. called: the argument of ours that holds the data. An error that a call raises is raised
    again with the index of the item and what is unusual about its arguments.
    """
    binder, count = Binder(model, called), 0
    with evaluation(model):
        for item in data:
            where = f"{called}, item {count}"
            try:
                if isinstance(item, Sample):
                    _run_function(model, item, binder, where)
                else:
                    call(model, item)
            except Exception as error:
                raise binder.explained(error, item, where) from error
            count += 1
    return count


def _run_function(model: nn.Module, sample: Sample, binder: Binder, where: str) -> None:
    """Let the user's function call the model, and check what it calls it with. Raises ValueError if it does not."""
    called = []

    def hear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append(name)
        if not name:
            binder.check_values(args, kwargs, where)

    with listening(dict(model.named_modules()), hear):
        call(model, sample)
    if not called:
        raise ValueError(f"{where}: forward_fn(model, item) did not call the model that it was given")


def call(model: nn.Module, item: Any) -> Any:
    """``model`` on one item: a mapping (keyword arguments), a tuple or list (positional ones), a single argument, or a
    ``Sample``. It may write to what it is given.
    """
    if isinstance(item, Sample):
        return item.forward_fn(model, private_copy(item.item))
    args, kwargs = arguments(item)
    return model(*private_copy(list(args)), **private_copy(kwargs))


def first_of(data: Iterator[Any] | None) -> tuple[Any, Iterator[Any] | None]:
    """The first item of ``data``, or None, and all of it, that item included."""
    if data is None:
        return None, None
    first = next(data, None)
    return first, itertools.chain([] if first is None else [first], data)


#: Modules of PyTorch with a native path that calls none of the layers inside.
_NATIVE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class _Watching(TorchFunctionMode):
    """Changes nothing. PyTorch takes no native path where a mode is on, which is so in this thread alone; the switch in
    ``torch.backends.mha`` is one for all. A mode costs microseconds at every operator, so it is there only for models
    that have such a path.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and every layer really called (PyTorch's native encoder path reads weights instead).

    At the end the state of the model is put back, as are modes and generators of random numbers. Flags are set without
    ``model.eval()``: a ``train`` of somebody's own may do more than that.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    state = HeldState(model)
    native = any(isinstance(module, _NATIVE) for module in model.modules())
    try:
        with torch.no_grad(), same_random_numbers(), _Watching() if native else contextlib.nullcontext():
            yield
    finally:
        state.restore()
        for module in training:
            module.training = True
