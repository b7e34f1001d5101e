"""Reads the code of a module as a graph: its ``forward`` runs once on a private twin, on values without content.

Nothing outside of the twin and of this thread is touched, unlike in ``torch.fx.symbolic_trace``, which replaces
``nn.Module.__call__`` for the whole process meanwhile. The twin (``twin``) is in eval mode and has a ``forward`` of its
own in each module: that of a layer writes a call into the graph, the others follow the code and note whose it is.

What the graph could not say is refused, so that code outside of it keeps its meaning: branches on values, state that
the code writes, tensors that no module holds, gradients or autocast switched on the way.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tilewright.convert.graph.caches import CacheValue, HeldCache
from tilewright.convert.graph.effects import effect_of
from tilewright.convert.graph.examples import Examples
from tilewright.convert.graph.leaves import SAME_PADDING_FUNCTIONS
from tilewright.convert.graph.twin import Twins
from tilewright.convert.graph.values import (
    COMPARISONS,
    Held,
    Untraceable,
    Value,
    expect,
    expect_tensor,
    is_shape,
    kind_of,
)

#: What nn.Module says where something else than a tensor is assigned to the name of one.
_ASSIGNED = re.compile(r"cannot assign .* (?:to|as) (buffer|parameter|child module) '(.+?)'")

#: Functions that make a tensor of none; recorded, so that each call makes its own.
_FACTORIES = {
    *(
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        torch.scalar_tensor,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.empty,
    ),
    *(torch.arange, torch.range, torch.linspace, torch.logspace, torch.eye, torch.tril_indices, torch.triu_indices),
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.hann_window, torch.hamming_window),
    *(torch.empty, torch.bartlett_window, torch.blackman_window, torch.kaiser_window),
}
#: What may be asked of a tensor that no module holds.
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_floating_point", "requires_grad", "layout"}


class _Attention(TorchFunctionMode):
    """Hears of PyTorch's functions in this thread, and in no other."""

    def __init__(self, capture: Capture):
        super().__init__()
        self.capture = capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.capture.call_of(func, types, args, kwargs or {})


class Capture(fx.proxy.TracerBase):
    """One reading of ``module``. opaque: whether the graph shows a submodule, given with its path, as one call.

    examples: what the inputs were in a call, by name. Then every node is computed on the way, and the code is told how
    many dimensions a value has, and how large they are where it branches on that; the graph asks again.
    """

    def __init__(
        self,
        module: nn.Module,
        opaque: Callable[[nn.Module, str], bool],
        examples: Mapping[str, Any] | None = None,
    ):
        self.examples = None if examples is None else Examples(module, examples)
        self.graph, self.modules = fx.Graph(), dict(module.named_modules(remove_duplicate=False))
        self.scope, self.module_stack = fx.proxy.Scope("", None), OrderedDict()
        self.node_name_to_scope: dict[str, Any] = {}
        #: Paths of the modules whose code runs, the outermost first.
        self.running: list[str] = [""]
        self._entered_with: list[bool] = []
        self._autocast = _autocast()
        self.refused: Untraceable | None = None
        #: Whether gradients are on for all that was recorded; None while nothing was. And who had switched them first.
        self.gradients: bool | None = None
        self._switched = ""
        #: What code finds under a global name.
        self.stand_ins = {
            "isinstance": lambda _: self.is_instance,
            "is_tensor": lambda found: self.is_tensor if found is torch.is_tensor else found,
            **dict.fromkeys(SAME_PADDING_FUNCTIONS, self._as_call),
        }
        self.twins = Twins(self, module, opaque)

    def run(self, inputs: tuple[str, ...], constants: Mapping[str, Any] = MappingProxyType({})) -> fx.Graph:
        """The graph of the module's forward with these arguments, and others that are always the same. Raises
        Untraceable.
        """
        given = dict(constants) | {name: self.create_proxy("placeholder", name, (), {}) for name in inputs}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_Attention(self))
            result = self.twins.call_root(given)
            self.create_node("output", "output", (self.create_arg(result),), {})
        if self.refused is not None:
            raise self.refused
        self.twins.check_unchanged()
        return self.graph

    def refuse(self, reason: str) -> NoReturn:
        """The code that runs just now cannot be part of a graph, even if it catches the exception."""
        self.refused = self.refused or Untraceable(self.running[-1], reason)
        raise self.refused

    # ---- the code of one module
    @contextlib.contextmanager
    def code_of(self, path: str) -> Iterator[None]:
        """While this is open, the code of the submodule at ``path`` runs."""
        self.running.append(path)
        self._entered_with.append(_gradients())
        try:
            yield
        except Untraceable:
            raise
        except Exception as error:  # whatever the user's forward raises on a symbolic input
            assigned = _ASSIGNED.match(str(error))
            reason = f"forward writes its {assigned[1]} {assigned[2]!r}" if assigned else describe(error)
            raise Untraceable(path, reason) from error
        finally:
            self.running.pop()
            self._entered_with.pop()

    def record_call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer at ``path`` is called."""
        return self.create_proxy("call_module", path, args, kwargs)

    # ---- nodes
    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        """A node that knows whose code made it."""
        if kind not in ("placeholder", "get_attr", "output") and not isinstance(target, type):
            self._check_modes()
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["path"] = self.running[-1]
        if self.examples is not None and kind != "output":
            reason = self.examples.compute(node, effect_of(node, self.modules))
            if reason is not None:
                self.refuse(reason)
        return node

    def proxy(self, node: fx.Node) -> Value:
        """What the code sees of a node."""
        if node.op == "placeholder" and self.examples is not None and isinstance(self.examples.of(node), HeldCache):
            return CacheValue(node, self)
        return Value(node, self)

    def _check_modes(self) -> None:
        """A graph runs with gradients on or off as a whole, and under its caller's autocast."""
        if _autocast() != self._autocast:
            self.refuse("forward switches autocast")
        now = _gradients()
        if now == self.gradients:
            return
        # Who switched: the innermost of those that were called with another mode.
        switched = [path for path, mode in zip(self.running[1:], self._entered_with, strict=True) if mode != now]
        if self.gradients is None:
            self.gradients, self._switched = now, switched[-1] if switched else ""
            return
        path = switched[-1] if switched and switched[-1] else self._switched
        raise Untraceable(path, "forward switches gradients on or off on the way")

    def create_arg(self, a: Any) -> Any:
        """An argument of a node. Raises Untraceable or TypeError for what no graph can hold."""
        kind: Any = type(a)
        if isinstance(a, Value):
            return a.node
        if isinstance(a, torch.Tensor):
            self.refuse("forward reads a tensor that is no parameter, buffer or attribute of a module")
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.twins.path_of(a), (), {})
        if isinstance(a, dict) and kind is not dict:
            if dataclasses.is_dataclass(kind):  # such as the outputs of transformers' models
                given = {f.name: getattr(a, f.name) for f in dataclasses.fields(kind)}
                given = {name: self.create_arg(value) for name, value in given.items() if value is not None}
                return self.create_node("call_function", kind, (), given)
            if kind is OrderedDict:
                return self.create_node("call_function", kind, ([(k, self.create_arg(v)) for k, v in a.items()],), {})
            raise TypeError(f"a {kind.__name__} made in forward cannot be written into a graph")
        if isinstance(a, collections.deque):
            raise TypeError("a deque made in forward cannot be written into a graph")
        return super().create_arg(a)

    # ---- what the code asks
    def call_of(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of PyTorch is called, by the code itself or by an operator on tensors."""
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Value) for leaf in leaves):
            return Value.__torch_function__(func, types, args, kwargs)
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            name = getattr(getattr(func, "__self__", None), "__name__", None) or getattr(func, "__name__", "")
            if name not in _METADATA:
                self.refuse("forward computes with a tensor that is no parameter, buffer or attribute of a module")
        elif func in _FACTORIES:
            return self.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)

    def _as_call(self, function: Any) -> Any:
        """What the code finds in place of a function that the graph shows as one call."""
        return lambda *args, **kwargs: self.create_proxy("call_function", function, args, kwargs)

    def is_instance(self, value: Any, kinds: Any) -> bool:
        """``isinstance``, as the code of a module sees it."""
        if not isinstance(value, Value):
            return isinstance(value, kinds)
        if isinstance(value, CacheValue) and self.examples is not None:
            return isinstance(self.examples.of(value.node).cache, kinds)
        known = None if isinstance(value, Held) else effect_of(value.node, self.modules)
        kind = kind_of(value, known is not None and known.tensor)
        if kind is None and self.examples is not None:
            kind = type(self.examples.of(value.node))
        if kind is None:
            self.refuse("forward asks for the type of a value that it computes")
        if kind is torch.Tensor and value.node.op == "placeholder":
            self.create_node("call_function", expect_tensor, (value.node,), {})
        return issubclass(kind, kinds)

    def is_tensor(self, value: Any) -> bool:
        """``torch.is_tensor``, as the code of a module sees it."""
        return self.is_instance(value, torch.Tensor)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The usual answer to a question about a shape, which the graph asks again; others are refused."""
        node = obj.node
        if node.op == "call_function" and node.target in COMPARISONS:
            sides = [arg for arg in node.args if not isinstance(arg, int)]
            if sides and all(isinstance(side, fx.Node) and is_shape(side) for side in sides):
                required = COMPARISONS[node.target] if self.examples is None else bool(self.examples.of(node))
                self.create_node("call_function", expect, (node, required), {})
                return required
        self.refuse("TraceError: forward branches on a value that it computes")

    def iter(self, obj: Any) -> Iterator[Any]:
        """Going through a value."""
        length = self.length_of(obj.node)
        if length is None:
            self.refuse("forward goes through a value that it computes, of a length that is not known")
        return iter([obj[i] for i in range(length)])

    def length_of(self, node: fx.Node) -> int | None:
        """Of a shape, a tuple or a list, if it is known."""
        example = None if self.examples is None else self.examples.of(node)
        return len(example) if isinstance(example, (tuple, list)) else None


def arguments_of(module: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the inputs of ``forward``, and the other arguments with their defaults. Raises ``Untraceable``."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    inputs, defaults = [], {}
    for i, parameter in enumerate(parameters):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise Untraceable("", "its forward takes any number of arguments")
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if i == 0 or parameter.default is inspect.Parameter.empty:
            inputs.append(parameter.name)
        else:
            defaults[parameter.name] = parameter.default
    if not inputs:
        raise Untraceable("", "its forward takes no argument")
    return tuple(inputs), defaults


def _gradients() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _autocast() -> tuple[Any, ...]:
    return tuple((torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in ("cpu", "cuda"))


def describe(error: Exception) -> str:
    """An exception in one line."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:160]}" if first else type(error).__name__
