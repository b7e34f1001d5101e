"""Drop-in modules: their classes by name, as checkpoints name them, and how all of them are cast and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import nn

from tilewright.kernels.dispatch.packed import invalidate

Module = TypeVar("Module", bound="DropIn")

_KINDS: dict[str, type[Any]] = {}


def register(kind: type[Any]) -> None:
    """Make a class known by its name. Of two classes with one name the first counts, but for one that is made anew."""
    known = _KINDS.setdefault(kind.__name__, kind)
    if (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__):
        _KINDS[kind.__name__] = kind


def registered_kinds() -> dict[str, type[Any]]:
    """All classes by name, in the order of the names."""
    return dict(sorted(_KINDS.items()))


class DropIn(nn.Module):
    """A module in the place of another of PyTorch's. A class that says which operator it calls may be in checkpoints.

    ``dtype`` is that of the module it stands for and follows ``.to(dtype)``; buffers keep theirs.
    """

    scheme_name: ClassVar[str]
    op_name: ClassVar[str]
    #: Whether a state dict must have the very dtype of what is kept in one, also where floats could be cast.
    _loads_exactly: ClassVar[bool] = False
    #: Names in state dicts of before the first release, and what they are called now.
    _before: ClassVar[Mapping[str, str]] = {}

    layer_name: str
    dtype: torch.dtype

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if hasattr(cls, "op_name"):
            register(cls)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return next(tensor.device for tensor in self._weight_tensors())

    def weight_bytes(self) -> int:
        """Bytes of the weight with its scales and zero points; without the bias."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._weight_tensors())

    def _weight_tensors(self) -> Iterator[torch.Tensor]:
        tensors = {**self._buffers, **self._parameters}
        return (tensor for name, tensor in tensors.items() if tensor is not None and name != "bias")

    def why_bad_buffer(self, name: str, value: torch.Tensor) -> str | None:
        """Why ``value``, of the right shape and dtype, cannot be the buffer called ``name``, or None."""
        return None

    def refresh(self) -> None:
        """Read anew from the buffers what the kernels take as numbers, if there is such a thing."""
        return

    def _label(self) -> str:
        return f"{type(self).__name__} {self.layer_name!r}" if self.layer_name else type(self).__name__

    def _check_layout(self, x: torch.Tensor) -> None:
        if x.layout != torch.strided:
            raise TypeError(f"{self._label()} takes dense input, not {x.layout}: give it x.to_dense()")

    def __prepare_scriptable__(self) -> NoReturn:
        # Asked by torch.jit.script, which cannot read how a call finds its kernel.
        raise TypeError(
            f"{self._label()} cannot be scripted: use torch.export.export or torch.jit.trace on the converted model"
        )

    def _kept_in_dtype(self) -> dict[str, torch.Tensor]:
        return dict(self.named_buffers(recurse=False))

    def _apply(self: Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Module:
        device = self.device
        before, parameters = self._kept_in_dtype(), self._parameters
        before |= {name: tensor.detach() for name, tensor in before.items() if name in parameters}
        super()._apply(fn, recurse)
        for name, after in self._kept_in_dtype().items():
            if after.dtype == before[name].dtype:
                continue
            if name in parameters:
                after.data = before[name].to(after.device)
            else:  # the buffer itself: in inference mode, ``after`` is no tensor to put its memory into
                self._buffers[name] = before[name].to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def renamed(self) -> dict[str, str]:
        """What the module's tensors were called before, where that is not what they are called now."""
        return {old: new for old, new in self._before.items() if new in self._buffers or new in self._parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for old, new in self._before.items():
            tables: tuple[dict[str, Any], ...] = (self._buffers, self._parameters)
            for table in tables:
                if old in table:
                    table[new] = table.pop(old)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        error_msgs: list[str] = rest[-1]
        shown = {}
        for old, name in self.renamed().items():
            if prefix + old in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name], shown[name] = state_dict.pop(prefix + old), old
        for name, own in self._kept_in_dtype().items():
            given, narrow = state_dict.get(prefix + name), own.dtype.itemsize == 1 or not own.is_floating_point()
            if given is not None and given.dtype != own.dtype and (narrow or self._loads_exactly):
                # copy_ would truncate a float weight to integers, or assign=True take a bias in another dtype.
                error_msgs.append(
                    f"{prefix}{shown.get(name, name)} must be {own.dtype}, not {given.dtype}: "
                    f"this state dict is not of a {type(self).__name__}"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            if tensor.is_inference():
                invalidate(tensor)
        self.refresh()
