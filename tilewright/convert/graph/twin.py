"""A private copy of a module and all below it, for reading its code: modules of its own, values in place of tensors.

In the twin every part is in eval mode and has no hooks. What it holds beside tensors is copied, so that code which
writes to its module changes the twin alone; ``check_unchanged`` then finds that it did.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tilewright.convert.code import is_somebodys, methods_of
from tilewright.convert.contents import Contents, changed_keys, children, is_constant, may_hold
from tilewright.convert.graph.overlay import Overlay
from tilewright.convert.graph.values import Held, Untraceable
from tilewright.convert.outside import Outside
from tilewright.convert.record import join
from tilewright.nn.stored_weight import noting_reads
from tilewright.nn.weight_holder import WeightHolder

if TYPE_CHECKING:
    from tilewright.convert.graph.capture import Capture

_KINDS = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "submodule"}


class _Layer(nn.Module):
    """In place of one of our layers, whose ``weight`` is made of what it holds: here that is a value too."""


class Twins:
    """The twin of ``module``. opaque: whether the graph shows a submodule, given with its path, as one call."""

    def __init__(self, capture: Capture, module: nn.Module, opaque: Callable[[nn.Module, str], bool]):
        self.capture = capture
        self.overlay = Overlay(capture.stand_ins, capture.refuse)
        self._memo: dict[int, Any] = {}
        self._paths: dict[int, str] = {}
        parts = list(_parts(module))
        for path, real in parts:
            twin = object.__new__(_Layer if isinstance(real, WeightHolder) else type(real))
            self._memo[id(real)] = twin
            if path is not None:
                self._paths[id(twin)] = path
        for path, real in parts:
            self._stand_for_tensors(path, real)
        for _, real in parts:
            try:
                self._fill(real)
            except Untraceable:
                raise
            except Exception as error:  # whatever cannot be copied
                raise Untraceable("", f"{type(real).__name__} cannot be copied ({error})") from error
        for path, real in parts:
            if path is not None and real is not module and opaque(real, path):
                vars(self._memo[id(real)])["forward"] = functools.partial(_record, capture, path)
            else:
                self._give_forward(path, real)
        self._root, self._parameters = self._memo[id(module)], inspect.signature(type(module).forward).parameters
        self._watch([(path or "", real) for path, real in parts])

    # ---- making it
    def _stand_for_tensors(self, path: str | None, real: nn.Module) -> None:
        if isinstance(real, torch.jit.ScriptModule):
            return  # what it holds comes in new objects each time
        named = [(n, t) for table in ("_parameters", "_buffers") for n, t in vars(real).get(table, {}).items()]
        for name, tensor in [*named, *vars(real).items()]:
            if isinstance(tensor, torch.Tensor):
                self._memo.setdefault(
                    id(tensor), Held(self.capture, None if path is None else join(path, name), tensor)
                )
        for value in _inside(real) if is_somebodys(real) else ():
            if isinstance(value, torch.Tensor):
                self._memo.setdefault(id(value), Held(self.capture, None, value))

    def _fill(self, real: nn.Module) -> None:
        twin: Any = self._memo[id(real)]
        if isinstance(real, torch.jit.ScriptModule):
            vars(twin).update(vars(real))
            return
        state: dict[str, Any] = {}
        own = is_somebodys(real)
        for name, value in vars(real).items():
            if name in _KINDS:
                state[name] = {n: None if each is None else self._memo[id(each)] for n, each in value.items()}
            elif "_hooks" in name and isinstance(value, dict):
                state[name] = OrderedDict()
            elif isinstance(value, types.FunctionType):
                state[name] = self.overlay.of(value)
            elif name != "forward":
                state[name] = copy.deepcopy(value, self._memo) if own and not is_constant(value) else value
        state["training"] = False
        vars(twin).update(state)
        if isinstance(real, WeightHolder):
            path = self._paths.get(id(twin))
            with noting_reads():  # nobody's code has asked for it
                weight = real.weight
            vars(twin)["weight"] = Held(self.capture, None if path is None else join(path, "weight"), weight)

    def _give_forward(self, path: str | None, real: nn.Module) -> None:
        twin, kind = self._memo[id(real)], type(real)
        if kind.forward is nn.Module.forward:
            return
        for name, function in methods_of(kind).items():
            laid_over = self.overlay.of(function)
            if laid_over is not function:
                vars(twin)[name] = types.MethodType(laid_over, twin)
        forward = vars(twin).pop("forward", None) or types.MethodType(kind.forward, twin)
        vars(twin)["forward"] = functools.wraps(forward)(functools.partial(self._follow, path, forward))

    def _follow(self, path: str | None, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with self.capture.code_of(self.capture.running[-1] if path is None else path):
            return forward(*args, **kwargs)

    # ---- running it
    def call_root(self, given: dict[str, Any]) -> Any:
        """The forward of the twin with these arguments."""
        positional = [
            given.pop(name)
            for name, each in self._parameters.items()
            if each.kind is each.POSITIONAL_ONLY and name in given
        ]
        return vars(self._root)["forward"](*positional, **given)

    def path_of(self, twin: nn.Module) -> str:
        """Where a part of the twin lies. Raises Untraceable."""
        path = self._paths.get(id(twin))
        if path is None:
            self.capture.refuse("forward passes on a module that is not registered in it")
        return path

    # ---- what it wrote
    def _watch(self, reals: list[tuple[str, nn.Module]]) -> None:
        """Remember what the twin holds, and what its code may write outside of it."""
        self._tables: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = []
        self._inside: list[tuple[str, str, Contents]] = []
        for path, real in reals:
            state = vars(self._memo[id(real)])
            tables = {"attribute": state, **{kind: state.get(name) for name, kind in _KINDS.items()}}
            self._tables += [(path, kind, table, dict(table)) for kind, table in tables.items() if type(table) is dict]
            for name, value in state.items() if is_somebodys(real) else ():
                if name not in _KINDS and "_hooks" not in name and children(value) is not None:
                    self._inside.append((path, name, Contents([value])))
        self._outside = Outside(real for _, real in reals)

    def check_unchanged(self) -> None:
        """Raise Untraceable if reading the code has written something. What lies outside of the twin is put back."""
        written = [
            (path, f"its {kind} {str(key)!r}")
            for path, kind, table, before in self._tables
            for key in changed_keys(before, table)
        ]
        written += [(path, f"into its attribute {name!r}") for path, name, each in self._inside if each.changed()]
        if words := self._outside.changed():
            self._outside.restore()
            written += [("", each) for each in words]
        written += [("", f"the global {name!r}") for name in self.overlay.assigned()]
        if written:
            path, what = written[0]
            raise Untraceable(path, f"forward writes {what}", frozenset(path for path, _ in written))


def _record(capture: Capture, path: str, /, *args: Any, **kwargs: Any) -> Any:
    return capture.record_call(path, args, kwargs)


def _inside(real: nn.Module) -> Iterator[Any]:
    """What lies in the containers and objects that a module holds, tensors and modules among it."""
    stack = [value for name, value in vars(real).items() if name not in _KINDS and may_hold(value)]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            stack += filter(may_hold, children(value) or ())


def _parts(module: nn.Module) -> Iterator[tuple[str | None, nn.Module]]:
    """The module and all below it with their paths; then with None those that lie in containers, registered nowhere."""
    registered = {part: path for path, part in module.named_modules()}
    yield from ((path, part) for part, path in registered.items())
    known, stack = set(registered), list(registered)
    while stack:
        holder = stack.pop()
        for value in _inside(holder) if is_somebodys(holder) else ():
            if isinstance(value, nn.Module) and value not in known:
                new = [part for part in value.modules() if part not in known]
                known.update(new)
                stack += new
                yield from ((None, part) for part in new)
