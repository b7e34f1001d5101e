"""A graph that Dynamo captured, with the tensors behind its inputs.

Dynamo makes the parameters of a model inputs of the graph, so that one compiled graph may serve several layers, and
weights may change. What is made from a weight, such as its quantised form, is therefore an input too: ``Prepared``
makes it from the weight that a call brings, once, and again when the weight is another or was written to.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn

from tilewright.backend.record import GraphReport
from tilewright.convert.graph import added_to
from tilewright.kernels.dispatch.derivatives import is_differentiated
from tilewright.kernels.dispatch.same import TensorCache, version_of

Make = Callable[..., Sequence[torch.Tensor]]
#: Operators that write into their first operand, as methods too.
_WRITING = ("setitem", "iadd", "isub", "imul", "itruediv")
_ATTRIBUTE = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Neither gradients nor autocast nor inference tensors: what is made may be used in any mode later."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Prepared:
    """Tensors made from others.

    sources: each the position of an input of the graph, or a tensor that the graph holds. first: what ``make`` gives
    for those of the first call, if it is known already.
    """

    def __init__(self, sources: Sequence[int | torch.Tensor], make: Make, first: Sequence[torch.Tensor] | None = None):
        self.sources, self.make = tuple(sources), make
        self.first = None if first is None else tuple(first)
        self._known: TensorCache[tuple[torch.Tensor, ...]] = TensorCache()

    def __call__(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """What ``make`` gives for the sources among ``inputs``."""
        tensors = [inputs[s] if isinstance(s, int) else s for s in self.sources]
        key = tuple(map(id, tensors))
        made = self._known.get(key, tensors)
        return self._known.make(key, tensors, lambda: self._make(tensors)) if made is None else made

    def _make(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        first, self.first = self.first, None
        if first is not None:
            return first
        with plain_arithmetic():
            return tuple(self.make(*(tensor.detach() for tensor in tensors)))


class AllPrepared:
    """What every ``Prepared`` of a graph gives, one after the other.

    The weights of the last call are known at a glance: there may be a hundred, and most models have but one set.
    """

    def __init__(self, prepared: Sequence[Prepared]):
        self.prepared = tuple(prepared)
        self._sources = [source for each in prepared for source in each.sources]
        self._last: TensorCache[list[torch.Tensor]] = TensorCache()

    def __call__(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """See ``Prepared``. The caller does not change the list."""
        tensors = [inputs[s] if isinstance(s, int) else s for s in self._sources]
        made = self._last.get(None, tensors)
        if made is not None:
            return made
        if any(version_of(tensor) < 0 for tensor in tensors):  # writes into them leave no trace
            return self._all(inputs)
        return self._last.make(None, tensors, lambda: self._all(inputs))

    def _all(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        return [tensor for each in self.prepared for tensor in each(inputs)]


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph in nodes of its own: Dynamo goes on to read the ones it gave."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, twins)
    graph.output(output)
    for node, twin in twins.items():
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    copied = fx.GraphModule(gm, graph, type(gm).__name__)
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    return copied


class Captured:
    """A copy of the graph that a backend gets, for changing, and the inputs it gets with it."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]):
        self.gm = _copy(gm)
        self.graph, self.inputs = self.gm.graph, list(inputs)
        self.placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self._index = {node: i for i, node in enumerate(self.placeholders)}
        self.prepared: list[Prepared] = []
        self.made: list[torch.Tensor] = []
        self.report = GraphReport()
        #: Whether somebody may ask for derivatives of what this graph computes.
        self.trains = is_differentiated(*inputs)
        #: Whether it calls a transformation of ``torch.func`` or enters a level of forward-mode AD.
        self.transforms = any(map(_begins_transformation, self.graph.nodes))

    # ---- reading the graph
    def weight(self, node: Any) -> torch.Tensor | None:
        """The parameter or buffer that ``node`` stands for; None if it is computed, or an argument of a call."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "placeholder":
            value = self.inputs[self._index[node]] if node in self._index else None
            held = isinstance(value, nn.Parameter) or getattr(value, "_dynamo_static_input_type", None)
            return value if held and isinstance(value, torch.Tensor) else None
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(self.gm.get_submodule(owner), name, None)
            return value if isinstance(value, torch.Tensor) else None
        return None

    def layer_of(self, node: fx.Node) -> str:
        """The dotted name of the module whose parameter ``node`` is."""
        if "tilewright_layer" in node.meta:
            return str(node.meta["tilewright_layer"])
        source = getattr(node, "_dynamo_source", None)
        parts = _ATTRIBUTE.findall(source.name if source is not None else "")
        return ".".join(parts[:-1]) if parts else node.name

    @staticmethod
    def value(node: Any) -> Any:
        """The fake tensor (or symbolic number) that stands for what ``node`` gives; what is no node is itself."""
        return node.meta.get("example_value") if isinstance(node, fx.Node) else node

    def number(self, value: Any) -> float | None:
        """A number of the graph as a constant: with ``dynamic=True`` Dynamo makes inputs of floats such as eps."""
        value = self.value(value)
        if isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            return float(value)
        return None

    def added(self, user: fx.Node, end: fx.Node) -> fx.Node | None:
        """What ``user`` adds to ``end`` element by element, unless it writes the sum over something else."""
        other = added_to(user, end)
        if mutates(user) and user.args[0] is not end:
            return None
        return other if same_size(self.value(other), self.value(end)) else None

    # ---- changing it
    def prepare(
        self, name: str, sources: Sequence[fx.Node], make: Make, made: Sequence[torch.Tensor] | None = None
    ) -> list[fx.Node]:
        """Inputs of the graph for what ``make`` gives for the weights behind ``sources``.

        name: for the new inputs. made: what ``make`` would give now, if that is known.
        """
        given = [self._index[node] if node.op == "placeholder" else self.weight(node) for node in sources]
        prepared = Prepared(given, make, made)  # type: ignore[arg-type]
        values = prepared(self.inputs)
        self.prepared.append(prepared)
        nodes = []
        for i, value in enumerate(values):
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"made_{re.sub(r'[^0-9a-zA-Z_]', '_', name)}_{i}")
            node._dynamo_source = None
            node.meta["tilewright_layer"] = name
            # Its address does not change from call to call, which CUDA graphs make use of.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node.meta["example_value"] = _fake(value)
            self.made.append(value)
            nodes.append(node)
        return nodes

    def finish(self) -> tuple[list[int], list[Any]]:
        """Drop what nobody reads. Returns the positions of the inputs left, and all inputs, the made ones last."""
        self.graph.eliminate_dead_code()
        kept = []
        for i, node in enumerate(self.placeholders):
            if not node.users and isinstance(self.weight(node), torch.Tensor):
                self.graph.erase_node(node)
            else:
                kept.append(i)
        self.gm.recompile()
        return kept, [*(self.inputs[i] for i in kept), *self.made]


def _begins_transformation(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return name.endswith(("_increment_nesting", "_enter_dual_level"))


def _fake(value: torch.Tensor) -> torch.Tensor:
    """Of fixed sizes: those of a weight do not change."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return value
    return context.fake_mode.from_tensor(value, static_shapes=True)


# ---- helpers of the rewrites
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def holding(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    """``layer`` with these very tensors as its parameters."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(layer, name, tensor)
    return layer


def mutates(node: fx.Node) -> bool:
    """Whether ``node`` may write into one of its arguments."""
    if node.op not in ("call_method", "call_function"):
        return node.op == "call_module"
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.strip("_") in _WRITING or (name.endswith("_") and not name.endswith("__"))


class Order:
    """Where nodes stand, and whether something is overwritten on the way from one to another."""

    def __init__(self, graph: fx.Graph):
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writers = [(i, node) for node, i in self._position.items() if mutates(node)]

    def may_move_to(self, start: fx.Node) -> Callable[[fx.Node, Sequence[fx.Node]], bool]:
        """For ``chain.follow``: whether a node that ends a chain from ``start`` may be computed there."""
        return lambda user, nodes: self.undisturbed(start, user, [*nodes, user])

    def undisturbed(self, start: fx.Node, end: fx.Node, chain: Sequence[fx.Node]) -> bool:
        """Whether no node but those of ``chain`` writes in place between ``start`` and ``end``."""
        first, last = self._position[start], self._position[end]
        return not any(first < i < last and node not in chain for i, node in self._writers)


def same_size(a: Any, b: Any) -> bool:
    """Whether two fake tensors have the same shape and dtype for certain, asking for no new guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if (a.dtype, a.device, a.dim()) != (b.dtype, b.device, b.dim()):
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def operator_of(node: Any) -> str | None:
    """``int8_linear`` for a call of ``torch.ops.tilewright.int8_linear``; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    namespace, _, name = str(node.target).rpartition("tilewright.")
    if namespace or not name or not isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return None
    return name.partition(".")[0]


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an operator ``tilewright::*`` by name, defaults filled in."""
    schema = getattr(torch.ops.tilewright, str(operator_of(node))).default._schema
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {**values, **node.kwargs}


def call_operator(graph: fx.Graph, name: str, arguments: dict[str, Any], like: fx.Node | None = None) -> fx.Node:
    """A new call. like: the node whose value it has."""
    node = graph.call_function(getattr(torch.ops.tilewright, name).default, (), arguments)
    if like is not None:
        node.meta.update(like.meta)
    return node
