"""Writes a graph anew in which int8 convolutions hand each other int8 tensors, where ``Flow`` says that they can."""

from __future__ import annotations

from typing import Any

from torch import fx

from tilewright.convert.graph import Modules, activation_of, addends, argument, calls, module_of, zero_padding
from tilewright.convert.network.int8_flow import PARTS, Flow, Scale
from tilewright.convert.network.marks import MarkWriter
from tilewright.convert.network.match import Site
from tilewright.kernels.activation import TABLE
from tilewright.nn import Int8ConvBnAct2d, quantized_ops


def write_int8(graph: fx.Graph, modules: Modules, sites: list[Site]) -> tuple[fx.Graph, ...]:
    """Let the int8 convolutions of a rewritten graph hand each other int8 tensors.

    Returns the graph as it was, where they hand on floats, and the same with every float rounded that is int8 now: what
    the new one computes. Nothing, if there are no such convolutions.
    """
    quantized = {site.name for site in sites if isinstance(modules[site.name], Int8ConvBnAct2d)}
    if not quantized:
        return ()
    flow = Flow(graph, modules, sites, quantized)
    scales: dict[fx.Node, Scale] = {}
    for node, scale in flow.ports():
        layer = modules[scale.layer]
        if scale.port == "x" or getattr(layer, "residual_scale", None) is not None:
            scales.setdefault(flow.leader(node), scale)
    stored = flow.stored(scales)
    tensors = [node for node in stored if not calls(node, *PARTS)]
    steps = _copied(graph, flow, {}), _copied(graph, flow, {node: scales[flow.leader(node)] for node in tensors})
    nonnegative = _nonnegative(flow, stored)
    order = list(graph.nodes)
    layer_nodes: dict[str, fx.Node] = {}

    def attribute(scale: Scale, name: str) -> fx.Node:
        if scale.layer not in layer_nodes:
            with graph.inserting_after(last_placeholder):
                layer_nodes[scale.layer] = graph.get_attr(scale.layer)
        with graph.inserting_after(layer_nodes[scale.layer]):
            return graph.call_function(getattr, (layer_nodes[scale.layer], name))

    def scale_of(node: fx.Node) -> fx.Node:
        scale = scales[flow.leader(node)]
        return attribute(scale, f"{scale.port}_scale")

    def zero_of(node: fx.Node) -> fx.Node:
        scale = scales[flow.leader(node)]
        return attribute(scale, f"{scale.port}_zero")

    def dtype_of(node: fx.Node) -> fx.Node:
        return attribute(scales[flow.leader(node)], "dtype")

    last_placeholder = [node for node in order if node.op == "placeholder"][-1]
    in_int8: dict[fx.Node, fx.Node] = {}
    marks = MarkWriter(graph)

    def as_int8(node: fx.Node) -> fx.Node:
        """An int8 form of a float tensor, made once, right after it."""
        if node in stored:
            return node
        if node not in in_int8:
            scale, zero = scale_of(node), zero_of(node)  # the one made first stands last
            after = scale if node.op == "placeholder" else node
            in_int8[node] = marks.quantize(node, scale, zero, flow.image_dims(scales[flow.leader(node)]), after)
        return in_int8[node]

    for node in order:
        site = flow.sites.get(node)
        if site is not None:
            arguments: list[Any] = [*node.args]
            nonneg, residual = site.x in nonnegative, site.residual
            arguments[1] = as_int8(site.x)
            if node in stored:
                node.args = (*arguments, scale_of(node), nonneg, zero_of(node))
                marks.of[node] = marks.absorbed((arguments[1], residual), flow.image_dims(Scale(site.name, "x")), node)
            else:
                given = marks.joined((arguments[1], residual if residual in stored else None))
                node.args = (*arguments, None, nonneg, 0, given)
        elif node in stored and (new := _in_int8(flow, node, zero_of)) is not None:
            marks.of[new] = marks.of[node.args[0]]
            flow.replace(node, new)
        elif node in stored and flow.joins(node):
            parts = [as_int8(part) for part in flow.joins(node)]
            node.args = (parts, *node.args[1:])
            marks.of[node] = marks.joined(parts)
        elif node in stored and flow.passes(node):
            source: fx.Node = node.args[0]
            marks.of[node] = marks.reshaped(node, source) if flow.reshapes(node) else marks.of[source]
        elif (pair := addends(node)) is not None and any(part in stored for part in pair):
            _write_addition(flow, node, pair, marks, scales, scale_of, zero_of, dtype_of)
        elif (average := flow.averages(node)) is not None and node.args[0] in stored:
            source = node.args[0]
            with graph.inserting_before(node):
                arguments = [source, scale_of(source), dtype_of(source), *average, zero_of(source)]
                new = graph.call_function(quantized_ops.mean, tuple(arguments))
                new = graph.call_function(quantized_ops.mark, (new, marks.of[source]))
            flow.replace(node, new)
    return steps


def _copied(graph: fx.Graph, flow: Flow, rounded: dict[fx.Node, Scale]) -> fx.Graph:
    """``graph`` in nodes of its own, some of its values rounded to int8 of a scale."""
    new, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    new.output(new.graph_copy(graph, twins))
    for node, place in rounded.items():
        twin = twins[node]
        readers = [user for user in twin.users if not flow.asks_size(user)]
        with new.inserting_after(twin):
            layer = new.get_attr(place.layer)
        with new.inserting_after(layer):
            scale = new.call_function(getattr, (layer, f"{place.port}_scale"))
        with new.inserting_after(scale):
            zero = new.call_function(getattr, (layer, f"{place.port}_zero"))
        with new.inserting_after(zero):
            value = new.call_function(quantized_ops.rounded, (twin, scale, flow.image_dims(place), zero))
        for reader in readers:
            reader.replace_input_with(twin, value)
    return new


def _write_addition(
    flow: Flow,
    node: fx.Node,
    pair: tuple[fx.Node, fx.Node],
    marks: MarkWriter,
    places: dict[fx.Node, Scale],
    scale_of: Any,
    zero_of: Any,
    dtype_of: Any,
) -> None:
    """An addition that no convolution took over, of tensors of which at least one is int8."""
    graph, stored = flow.graph, flow.stored_nodes
    scales = [scale_of(part) if part in stored else 1.0 for part in pair]
    zeros = [zero_of(part) if part in stored else 0 for part in pair]
    if node in stored:
        with graph.inserting_before(node):
            numbers = (scale_of(node), (*zeros, zero_of(node)))
            new = graph.call_function(quantized_ops.add, (pair[0], scales[0], pair[1], scales[1], *numbers))
        marks.of[new] = marks.absorbed(pair, flow.image_dims(places[flow.leader(node)]), new)
        flow.replace(node, new)
        return
    for part, scale, zero in zip(pair, scales, zeros, strict=True):
        if part in stored:
            with graph.inserting_before(node):
                wide = graph.call_function(quantized_ops.dequantize, (part, scale, dtype_of(part), zero))
                wide = graph.call_function(quantized_ops.mark, (wide, marks.of[part]))
            node.replace_input_with(part, wide)


def _in_int8(flow: Flow, node: fx.Node, zero_of: Any) -> fx.Node | None:
    """In front of ``node``, which passes values on: what does the same to int8, where that is another function."""
    graph, modules, source = flow.graph, flow.modules, node.args[0]
    with graph.inserting_before(node):
        if (window := flow.max_window(node)) is not None:
            return graph.call_function(quantized_ops.max_pool2d, (source, *window))
        if (pads := zero_padding(node, modules)) is not None:
            return graph.call_function(quantized_ops.pad, (source, pads, zero_of(node)))
        if activation_of(node, modules) is not None:  # a ReLU: others do not pass values on
            in_place = getattr(module_of(node, modules), "inplace", node.target == "relu_")
            in_place = bool(in_place or argument(node, 1, "inplace", False))
            return graph.call_function(quantized_ops.relu, (source, zero_of(node), in_place))
    return None


def _nonnegative(flow: Flow, stored: set[fx.Node]) -> set[fx.Node]:
    """Stored tensors that stand for no negative value, whatever the input."""
    found: set[fx.Node] = set()
    for node in flow.graph.nodes:
        if node not in stored:
            continue
        site = flow.sites.get(node)
        parts = flow.joins(node) or ([node.args[0]] if flow.passes(node) else [])
        if site is not None:
            positive = TABLE[site.activation].nonnegative
        else:
            positive = bool(parts) and all(part in found for part in parts)
        if positive:
            found.add(node)
    return found


def before_integers(rounded: fx.Graph, modules: Modules) -> list[str]:
    """Modules whose parameters have a part in what is rounded. rounded: the last of what ``write_int8`` returns."""
    ends: list[fx.Node] = []
    for node in rounded.nodes:
        if calls(node, quantized_ops.rounded):
            ends.append(node)
        elif node.op == "call_method" and node.target == "run" and len(node.args) > 2:
            layer = modules.get(str(node.args[0].target))
            ends += [each for each in node.args[1:3] if isinstance(layer, Int8ConvBnAct2d) and each is not None]
    found: dict[str, None] = {}
    seen: set[fx.Node] = set()
    while ends:
        node = ends.pop()
        if node in seen:
            continue
        seen.add(node)
        ends += node.all_input_nodes
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
            found[name if name in modules else name.rpartition(".")[0]] = None
    return list(found)
