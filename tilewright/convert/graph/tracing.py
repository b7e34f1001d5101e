"""Which parts of a model can be read as a graph of calls: regions, found by tracing ``forward`` with ``torch.fx``.

A region is a module whose ``forward`` traces once its children are followed down to layers. If a child does not trace
it becomes one opaque call of the region and is looked at by itself, as is every module that a hook watches. If a
module's own code does not trace, its children are looked at instead. The regions found this way are as large as can be.

Arguments with a default are taken at that value, but for the first. Where the code asks about a shape
(``if x.shape[1] != self.channels: raise``) the usual answer is assumed and the graph says so, by a call of ``expect``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from tilewright.convert.record import join
from tilewright.convert.structure import copy_structure
from tilewright.kernels.activation import module_activation
from tilewright.nn import ConvLayer, FoldedBatchNorm, FusedActivation, QuantizedLinear
from tilewright.nn.conv_layer import pads_by_size

logger = logging.getLogger("tilewright")

#: Classes of other libraries that normalise as a batch-norm in eval mode does; known by name, not imported.
NORM_NAMES = ("FrozenBatchNorm2d", "BatchNormAct2d", "FrozenBatchNormAct2d", "DetrFrozenBatchNorm2d")
#: Functions of other libraries that pad as TensorFlow's "SAME" does: (x, convolution) -> x.
SAME_PADDING_FUNCTIONS = ("apply_tf_padding",)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
#: Each with the usual answer.
_COMPARISONS: dict[Any, bool] = {
    operator.eq: True,
    **dict.fromkeys((operator.ne, operator.lt, operator.gt, operator.le, operator.ge), False),
}
_SHAPE_METHODS = ("size", "dim")
_SHAPE_FUNCTIONS = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, len)


class NotAsExpected(Exception):
    """A shape is not what the graph was made for."""


def expect(value: Any, required: bool) -> None:
    """What the graph was made for: raise ``NotAsExpected`` unless the truth of ``value`` is ``required``."""
    if bool(value) is not required:
        raise NotAsExpected


class Untraceable(Exception):
    """The code of the module at ``path`` cannot be traced."""

    def __init__(self, path: str, reason: str):
        super().__init__(reason)
        self.path, self.reason = path, reason


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch-norm of any kind."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return type(module).__name__ in NORM_NAMES and isinstance(getattr(module, "running_var", None), torch.Tensor)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` runs more than its ``forward``."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph shows ``module`` as one call."""
    if isinstance(module, FoldedBatchNorm):
        return module.then is None
    if isinstance(module, (ConvLayer, QuantizedLinear, FusedActivation)):
        return True
    if has_hooks(module) or "forward" in vars(module) or is_norm(module) or pads_by_size(module):
        return True
    if module_activation(module) is not None:
        return True
    if isinstance(module, _CONTAINERS) and type(module).__module__.startswith("torch.nn"):
        return False
    if type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")):
        return True
    # A subclass that keeps the forward of one of PyTorch's layers is that layer.
    return any(
        base.__module__.startswith("torch.nn.modules") and base not in (nn.Module, *_CONTAINERS)
        for base in type(module).__mro__
        if "forward" in vars(base) and vars(base)["forward"] is type(module).forward
    )


def is_known(module: nn.Module) -> bool:
    """Whether a leaf is one of PyTorch's own or ours: it does the same operators in each call, in any memory layout."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "tilewright.nn")):
        return True
    return (
        is_norm(module)
        or module_activation(module) is not None
        or (is_leaf(module) and not (has_hooks(module) or "forward" in vars(module)))
    )


def _is_shape(node: fx.Node) -> bool:
    """Whether a node's value is made from the shape of a tensor alone."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.target in _SHAPE_FUNCTIONS and all(
        isinstance(arg, int) or (isinstance(arg, fx.Node) and _is_shape(arg)) for arg in node.args
    )


#: Is shown a node and its value.
Watch = Callable[[fx.Node, Any], None]


class _Tracer(fx.Tracer):
    def __init__(self, opaque: frozenset[str], same_padding: tuple[Any, ...]):
        super().__init__(autowrap_functions=same_padding)
        self.opaque = opaque
        self.traced_func_name = "_tilewright_entry"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Untraceable:
            raise
        except Exception as error:  # whatever the user's forward raises on a symbolic input
            raise Untraceable(self.path_of_module(m), _describe(error)) from error

    def create_arg(self, a: Any) -> Any:
        kind: Any = type(a)
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, dict) and kind is not dict:
            if dataclasses.is_dataclass(kind):  # such as the outputs of transformers' models
                given = {f.name: getattr(a, f.name) for f in dataclasses.fields(kind)}
                given = {name: self.create_arg(value) for name, value in given.items() if value is not None}
                return self.create_node("call_function", kind, (), given)  # type: ignore[arg-type]
            if kind is OrderedDict:
                return self.create_node("call_function", kind, ([(k, self.create_arg(v)) for k, v in a.items()],), {})
            raise TypeError(f"a {kind.__name__} made in forward cannot be written into a graph")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        if node.op == "call_function" and node.target in _COMPARISONS:
            sides = [arg for arg in node.args if not isinstance(arg, int)]
            if sides and all(isinstance(side, fx.Node) and _is_shape(side) for side in sides):
                required = _COMPARISONS[node.target]
                self.create_node("call_function", expect, (node, required), {})
                return required
        return super().to_bool(obj)


def _describe(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:160]}" if first else type(error).__name__


@dataclasses.dataclass
class Region:
    """A module that traces. name: in the model. graph: with names of submodules relative to ``module``.

    inputs: names of the arguments that the graph takes. defaults: of the others, taken at these values.
    """

    name: str
    module: nn.Module
    graph: fx.Graph
    inputs: tuple[str, ...]
    defaults: dict[str, Any]

    def modules(self) -> dict[str, nn.Module]:
        """Submodules by the names that the graph uses."""
        return dict(self.module.named_modules(remove_duplicate=False))

    def calls(self) -> Iterator[fx.Node]:
        """The nodes that call a module, in order."""
        return (node for node in self.graph.nodes if node.op == "call_module")

    def interpret(self, watch: Watch, given: tuple[Any, ...]) -> Any:
        """Run the graph on ``given``, its inputs, and show every value to ``watch``."""
        return _Interpreter(self.module, self.graph, watch).run(*given)

    def open_call(self, node: fx.Node, path: str) -> None:
        """Show what the submodule at ``path`` computes in place of ``node``, a call of another on one value."""
        module, value = self.module.get_submodule(path), node.args[0]
        with self.graph.inserting_before(node):
            if is_leaf(module):
                result: Any = self.graph.call_module(path, (value,))
            else:
                try:
                    inner = trace(path, module)
                except Untraceable:
                    return
                copies: dict[fx.Node, Any] = {}
                for each in inner.graph.nodes:
                    if each.op == "placeholder":
                        copies[each] = value
                    elif each.op == "output":
                        result = fx.map_arg(each.args[0], copies.__getitem__)
                    else:
                        copies[each] = self.graph.node_copy(each, copies.__getitem__)
                        if each.op in ("call_module", "get_attr"):
                            copies[each].target = join(path, str(each.target))
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def why_not_called_so(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Which argument of a call the graph was not made for, in words, or None."""
        found = bind_call(type(self.module), self.inputs, self.defaults, args, kwargs)
        return f"it is called with another {found} than it traces with" if isinstance(found, str) else None


class _Interpreter(fx.Interpreter):
    """Runs a graph and shows every value to ``watch``."""

    def __init__(self, module: nn.Module, graph: fx.Graph, watch: Watch):
        super().__init__(module, graph=graph)
        self.watch = watch
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.watch(n, value)
        return value


@functools.lru_cache(maxsize=1024)
def _parameter_names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def bind_call(
    kind: Any,
    inputs: tuple[str, ...],
    defaults: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, ...] | str:
    """What a call of the class ``kind`` gives the inputs of a graph; the argument's name if it asks for something else.

    inputs, defaults: as of ``Region``.
    """
    names = _parameter_names(kind)
    if len(args) > len(names):
        return "number of arguments"
    values = dict(zip(names, args, strict=False))
    values.update(kwargs)
    found = []
    for name in inputs:
        if name not in values:
            return name
        found.append(values.pop(name))
    for name, value in values.items():
        if name not in defaults:
            return name
        required = defaults[name]
        plain = isinstance(value, (bool, int, float, str)) and type(value) is type(required)
        if value is not required and not (plain and value == required):
            return name
    return tuple(found)


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


def trace(name: str, module: nn.Module, opaque: frozenset[str] = frozenset()) -> Region:
    """The region that ``module`` is, with the submodules ``opaque`` as single calls. Raises ``Untraceable``."""
    inputs, defaults = arguments_of(module)
    # A forward may write to its module; nothing symbolic must be left in the user's.
    twin = copy_structure(module)
    for part in twin.modules():
        if isinstance(vars(part).get("forward"), ReplacedForward):
            del vars(part)["forward"]
    space = {"forward": type(module).forward}
    given = ", ".join(f"{each}={each}" for each in inputs)
    exec(f"def entry(self, {', '.join(inputs)}):\n    return forward(self, {given})", space)
    twin.__class__ = type(type(module).__name__, (type(module),), {"_tilewright_entry": space["entry"]})
    try:
        with torch.no_grad():
            graph = _Tracer(opaque, _same_padding_functions(module)).trace(twin)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable("", _describe(error)) from error
    for node in graph.nodes:
        if node.op == "get_attr" and not _has(module, str(node.target)):
            raise Untraceable("", f"it makes tensors of its own ({node.target})")
    return Region(name, module, graph, inputs, defaults)


def _has(module: nn.Module, path: str) -> bool:
    prefix, _, attribute = path.rpartition(".")
    try:
        return hasattr(module.get_submodule(prefix), attribute)
    except AttributeError:
        return False


class ReplacedForward:
    """Base of what the converter puts in place of a ``forward``, by which it is recognised."""


def _same_padding_functions(module: nn.Module) -> tuple[Any, ...]:
    """Functions that pad by the size of the input, in the modules where the model's classes are defined."""
    import sys

    sources = {type(part).__module__ for part in module.modules()}
    found = (getattr(sys.modules.get(source), name, None) for source in sources for name in SAME_PADDING_FUNCTIONS)
    return tuple({id(function): function for function in found if callable(function)}.values())


def holds_convolution(module: nn.Module) -> bool:
    """Whether there is a convolution in ``module``."""
    return any(isinstance(part, (nn.modules.conv._ConvNd, ConvLayer)) for part in module.modules())


def find_regions(
    model: nn.Module,
    refused: Mapping[str, str] = MappingProxyType({}),
    parts: Set[nn.Module] = frozenset(),
    known: Sequence[Region] = (),
) -> tuple[list[Region], dict[str, str]]:
    """The regions of ``model`` that hold convolutions, and the modules whose code does not trace: name -> reason.

    refused: modules that are known not to trace, or not as they are called. parts: modules that may be replaced later,
    which the graphs therefore show as single calls. known: regions found before.
    """
    regions: list[Region] = []
    untraced: dict[str, str] = {}
    seen: set[int] = set()
    found_before = {region.name: region for region in known}

    def visit(name: str, module: nn.Module, own: bool = False) -> None:
        if id(module) in seen or not holds_convolution(module):
            return
        seen.add(id(module))
        if is_leaf(module) and not own and not has_hooks(module):
            return
        if isinstance(module, (nn.modules.conv._ConvNd, ConvLayer)):
            return
        if type(module).forward is nn.Module.forward:
            children(name, module)
            return
        try:
            if name in refused:
                raise Untraceable("", refused[name])
            region = found_before.get(name) or _trace_with_opaque_parts(name, module, parts)
        except Untraceable as error:
            untraced[name] = error.reason
            logger.debug("%s does not trace: %s", name or "the model", error.reason)
            children(name, module)
            return
        regions.append(region)
        modules = region.modules()
        for node in region.calls():
            visit(join(name, str(node.target)), modules[str(node.target)])

    def children(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            visit(join(name, child_name), child)

    visit("", model, own=True)
    return regions, untraced


def _trace_with_opaque_parts(name: str, module: nn.Module, parts: Set[nn.Module]) -> Region:
    opaque = frozenset(path for path, part in module.named_modules(remove_duplicate=False) if part in parts)
    while True:
        try:
            return trace(name, module, opaque)
        except Untraceable as error:
            if not error.path or error.path in opaque:
                raise
            opaque |= {error.path}
