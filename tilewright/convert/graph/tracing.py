"""Which parts of a model can be read as a graph of calls: regions, found by reading ``forward`` (``capture``).

A region is a module whose ``forward`` can be read once its children are followed down to layers. If a child cannot be
it becomes one opaque call of the region and is looked at by itself, as is every module that a hook watches. If a
module's own code cannot be read, its children are looked at instead. The regions found this way are as large as can be.

Arguments with a default are taken at that value, but for the first. Where the code asks about a shape
(``if x.shape[1] != self.channels: raise``) the usual answer is assumed and the graph says so, by a call of ``expect``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from tilewright.convert.graph.capture import Capture, arguments_of
from tilewright.convert.graph.leaves import has_hooks, holds_convolution, is_leaf, replaces_forward
from tilewright.convert.graph.listeners import told_by_hooks
from tilewright.convert.graph.memory import settle
from tilewright.convert.graph.values import Untraceable
from tilewright.convert.record import join
from tilewright.nn import ConvLayer

logger = logging.getLogger("tilewright")

_POSITIONAL_ONLY = inspect.Parameter.POSITIONAL_ONLY
#: Is shown a node and its value.
Watch = Callable[[fx.Node, tuple[Any, ...], Any], None]  # between them, what the node's arguments are


@dataclasses.dataclass
class Region:
    """A module that traces. name: in the model. graph: with names of submodules relative to ``module``.

    inputs: names of the arguments that the graph takes. defaults: of the others, taken at these values. gradients:
    whether its code leaves them as its caller has them, or turns them off. constants: further arguments that calls
    give, always these.
    """

    name: str
    module: nn.Module
    graph: fx.Graph
    inputs: tuple[str, ...]
    defaults: dict[str, Any]
    gradients: bool = True
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        self.watch(n, self.map_nodes_to_values(n.args, n), value)  # type: ignore[arg-type]
        return value


@functools.lru_cache(maxsize=1024)
def _parameter_names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def call_forward(
    owner: nn.Module,
    inputs: tuple[str, ...],
    values: Sequence[Any],
    constants: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The ``forward`` of the class with these values for ``inputs``, and the constants by name."""
    names = inspect.signature(type(owner).forward).parameters
    given = dict(zip(inputs, values, strict=True)) | dict(constants)
    placed = [given.pop(name) for name in inputs if name in names and names[name].kind is _POSITIONAL_ONLY]
    return type(owner).forward(owner, *placed, **given)


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


def trace_call(module: nn.Module, tensors: Mapping[str, Any], others: dict[str, Any]) -> Region:
    """The region that ``module`` is for calls with these arguments, of which the ``others`` are constants. Raises
    ``Untraceable``.
    """
    if replaces_forward(module):
        raise Untraceable("", "its forward was replaced on the instance")
    capture = Capture(module, lambda part, path: is_leaf(part), tensors)
    graph = capture.run(tuple(tensors), others)
    settle(graph, capture.modules)
    return Region("", module, graph, tuple(tensors), {}, capture.gradients is not False, others)


def trace(name: str, module: nn.Module, opaque: frozenset[str] = frozenset()) -> Region:
    """The region that ``module`` is, with the submodules ``opaque`` as single calls. Raises ``Untraceable``."""
    if replaces_forward(module):
        raise Untraceable("", "its forward was replaced on the instance")
    inputs, defaults = arguments_of(module)
    capture = Capture(module, lambda part, path: path in opaque or is_leaf(part))
    graph = capture.run(inputs)
    if paths := told_by_hooks(capture.modules, {str(node.target) for node in graph.nodes if node.op == "call_module"}):
        raise Untraceable(min(paths), "a hook inside may tell its code what it heard", paths)
    settle(graph, capture.modules)
    return Region(name, module, graph, inputs, defaults, capture.gradients is not False)


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
            region = found_before.get(name) or trace_with_opaque_parts(name, module, parts)
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


def trace_with_opaque_parts(name: str, module: nn.Module, parts: Set[nn.Module] = frozenset()) -> Region:
    """The region that ``module`` is, with ``parts`` and whatever cannot be read as single calls. Raises
    ``Untraceable``.
    """
    opaque = frozenset(path for path, part in module.named_modules(remove_duplicate=False) if part in parts)
    while True:
        try:
            return trace(name, module, opaque)
        except Untraceable as error:
            if "" in error.paths or error.paths <= opaque:
                raise
            opaque |= error.paths
