"""What stands for a value while the code of a module is read: a ``torch.fx`` proxy that keeps PyTorch's meaning.

``torch.fx``'s own proxy turns ``y += z`` into ``y = y + z``, knows no ``y[i] = z`` and lets ``y.data = z`` pass
without a trace. Here the first two are recorded as the operators in place that they are, and what cannot be recorded
is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

#: Each with the usual answer.
COMPARISONS: dict[Any, bool] = {
    operator.eq: True,
    **dict.fromkeys((operator.ne, operator.lt, operator.gt, operator.le, operator.ge), False),
}
_SHAPE_METHODS = ("size", "dim", "ndimension", "numel", "nelement")
#: Attributes of a tensor that are no tensors.
_SHAPES = ("shape", "ndim")
_ARITHMETIC = tuple(getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"))
_SHAPE_FUNCTIONS = (operator.getitem, *_ARITHMETIC, operator.neg, len)
#: Operators in place, and what each computes.
IN_PLACE: dict[Any, Any] = {
    getattr(operator, f"i{name.strip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
}


class NotAsExpected(Exception):
    """Something is not what the graph was made for."""


def expect(value: Any, required: bool) -> None:
    """What the graph was made for: raise ``NotAsExpected`` unless the truth of ``value`` is ``required``."""
    if bool(value) is not required:
        raise NotAsExpected


def expect_tensor(value: Any) -> None:
    """What the graph was made for: raise ``NotAsExpected`` unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise NotAsExpected


def put(target: Any, index: Any, value: Any) -> Any:
    """``target[index] = value``; returns the target."""
    target[index] = value
    return target


class Untraceable(Exception):
    """Why the code of a module cannot be read as a graph.

    path: of the module, relative to the one that is read. paths: of all that are known to be no part of the graph.
    """

    def __init__(self, path: str, reason: str, paths: frozenset[str] = frozenset()):
        super().__init__(reason)
        self.path, self.reason, self.paths = path, reason, paths | {path}


def is_shape(node: fx.Node) -> bool:
    """Whether a node's value is made from the shape of a tensor alone."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SHAPES
    return node.target in _SHAPE_FUNCTIONS and all(
        isinstance(arg, (int, float, slice)) or (isinstance(arg, fx.Node) and is_shape(arg)) for arg in node.args
    )


class Value(fx.Proxy):
    """Stands for what a node of the graph gives. tracer: the ``Capture``."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # of a protocol that a tensor takes part in otherwise
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            self.tracer.refuse(f"forward sets {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> Any:
        self.tracer.refuse(f"forward deletes {name!r} of a tensor")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", put, (self, index, value), {})

    def __delitem__(self, index: Any) -> Any:
        self.tracer.refuse("forward deletes an item of a value that it computes")

    def __len__(self) -> int:
        length: int | None = self.tracer.length_of(self.node)
        if length is None:
            self.tracer.refuse("forward asks for the length of a value that it computes")
        return length  # type: ignore[return-value]

    def __deepcopy__(self, memo: Any) -> Any:
        self.tracer.refuse("forward copies a tensor with deepcopy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.tracer.refuse("forward copies or pickles a tensor")

    def __repr__(self) -> str:
        return f"Value({self.node.name})"


def _in_place(form: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[Value, Any], Any]:
    def method(self: Value, other: Any) -> Any:
        # A number is a new one; a tensor is the same one with other values.
        target = plain if is_shape(self.node) else form
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _form, _plain in IN_PLACE.items():
    setattr(Value, f"__{_form.__name__}__", _in_place(_form, _plain))


class _Attribute(Value):
    """An attribute of a value: a method that will be called, or a node made when the attribute is used otherwise."""

    def __init__(self, root: Value, name: str):
        vars(self).update(tracer=root.tracer, _root=root, _name=name, _made=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Made when it is first asked for."""
        if self._made is None:
            made = self.tracer.create_proxy("call_function", getattr, (self._root, self._name), {}).node
            vars(self)["_made"] = made
        return self._made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self._name, (self._root, *args), kwargs)


class Held(Value):
    """A tensor that a module holds. path: its name; None if no name leads to it. Its node is made on first use."""

    def __init__(self, tracer: Any, path: str | None, tensor: torch.Tensor):
        vars(self).update(tracer=tracer, _path=path, _tensor=tensor, _made=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Made when it is first asked for."""
        if self._made is None:
            if self._path is None:
                self.tracer.refuse("forward reads a tensor that lies in a container, not in the module itself")
            vars(self)["_made"] = self.tracer.create_node("get_attr", self._path, (), {})
        return self._made

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "size", "dim", "numel", "nelement"):
            return getattr(self._tensor, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self._tensor)


def kind_of(value: Value, gives_tensor: bool) -> type | None:
    """The type of what ``value`` stands for, if it is known. gives_tensor: whether its node is known to give one."""
    if isinstance(value, Held):
        return type(value._tensor)
    node = value.node
    if node.op == "placeholder" or gives_tensor:
        return torch.Tensor
    if not is_shape(node):
        return None
    whole = node.target is getattr or (node.target == "size" and len(node.args) == 1)
    sliced = node.target is operator.getitem and isinstance(node.args[1], slice)
    if whole or sliced:
        return int if node.target is getattr and node.args[1] == "ndim" else torch.Size
    return float if node.target in (operator.truediv, operator.pow) else int
