"""Which tensors of a rewritten graph are kept in int8 between convolutions, and with whose scale.

A tensor is stored in int8 if an int8 convolution reads it and everything else that does can take it so: another
convolution (as its residual too), pooling, a reshape, a concatenation. Otherwise it stays float and is quantised once
for all int8 convolutions that read it. Scales live in the convolutions: the tensor that a layer convolves has the
layer's ``input_scale``, the one it adds its ``residual_scale``. Where a value passes through unchanged (pooling with a
maximum, a reshape, a concatenation) the tensors before and after share one scale.

What in a sample is not finite is lost in int8: marks of it go from where floats are quantised to where there are floats
again (``quantized_ops``). A sample is an index of the first dimension, which therefore stays first and whole in int8.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.convert.graph import (
    Modules,
    activation_of,
    addends,
    argument,
    calls,
    is_identity,
    module_of,
    zero_padding,
)
from tilewright.convert.network.marks import MarkWriter
from tilewright.convert.network.match import Site, dynamic_padding
from tilewright.kernels.activation import TABLE
from tilewright.nn import Int8ConvBnAct2d, quantized_ops

_PASSING_MODULES = (nn.MaxPool2d, nn.ReLU, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle)
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d)


def _forms(*names: str) -> tuple[Any, ...]:
    """The methods called so and the functions."""
    return tuple(form for name in names for form in (name, getattr(torch, name)))


def _is_inside(dim: object) -> bool:
    """Whether ``dim`` is surely another than the first one."""
    return isinstance(dim, int) and (dim > 0 or dim in (-1, -2))


_TURNS, _PARTS = _forms("permute", "transpose"), _forms("chunk", "split")
#: Values stay in order, and may be another number of samples.
_RESHAPES = ("view", *_forms("reshape", "flatten", "squeeze", "unsqueeze"))
_PASSING = (
    *(*_MAX_POOLS, F.relu, torch.relu, "relu", "relu_", F.channel_shuffle, F.pixel_shuffle, "contiguous"),
    *(*_RESHAPES, *_TURNS, *_PARTS),
)


@dataclass(frozen=True)
class Scale:
    """Where a scale lives: a buffer of a layer. port: "x" or "r"."""

    layer: str
    port: str


class Flow:
    """The tensors of one graph that int8 convolutions read, and their scales.

    sites: all convolutions. quantized: names of the layers that are, or are to be, int8.
    """

    def __init__(self, graph: fx.Graph, modules: Modules, sites: list[Site], quantized: set[str]):
        self.graph, self.modules = graph, modules
        self.sites = {site.call: site for site in sites if site.name in quantized}
        self._leader: dict[fx.Node, fx.Node] = {}
        #: Filled by ``stored``.
        self.stored_nodes: set[fx.Node] = set()
        self._unite()

    # ---- kinds of nodes
    def passes(self, node: fx.Node) -> bool:
        """Whether the values of ``node`` are values of its first argument, or zeros."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if is_identity(node, self.modules) or zero_padding(node, self.modules) is not None:
            return True
        module = module_of(node, self.modules)
        if module is not None:
            return type(module) in _PASSING_MODULES and not getattr(module, "return_indices", False)
        if calls(node, operator.getitem):
            return self._takes_part(node, node.args[0])
        return calls(node, *_PASSING) and not node.kwargs.get("return_indices") and self._keeps_samples(node)

    def _takes_part(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether an index takes a part of every sample, or one of the parts that a tensor was cut into."""
        index = node.args[1]
        if calls(source, *_PARTS):
            return isinstance(index, int)
        if not isinstance(index, tuple) or not index or self.asks_size(source):
            return False
        return bool(index[0] == slice(None)) or (index[0] is ... and len(index) < 4)

    def _keeps_samples(self, node: fx.Node) -> bool:
        """Whether the first dimension stays the first, and whole."""
        if calls(node, *_PARTS):
            return _is_inside(argument(node, 2, "dim", 0))
        if calls(node, *_forms("transpose")):
            return _is_inside(argument(node, 1, "dim0")) and _is_inside(argument(node, 2, "dim1"))
        if not calls(node, *_forms("permute")):
            return True
        order: Any = node.kwargs.get("dims", node.args[1:])
        order = order[0] if len(order) == 1 and isinstance(order[0], (list, tuple)) else order
        return bool(order) and order[0] == 0

    def max_window(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Kernel size, stride, padding, dilation and ceil_mode of a pooling with a maximum, or None."""
        module = module_of(node, self.modules)
        if isinstance(module, nn.MaxPool2d):
            return module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        if not calls(node, *_MAX_POOLS):
            return None
        defaults = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
        return tuple(argument(node, i, name, default) for i, (name, default) in enumerate(defaults.items(), 1))

    def joins(self, node: fx.Node) -> list[fx.Node]:
        """What ``node`` concatenates."""
        if not calls(node, torch.cat, torch.concat) or not _is_inside(argument(node, 1, "dim", 0)):
            return []
        parts = argument(node, 0, "tensors")
        return list(parts) if isinstance(parts, (list, tuple)) and all(isinstance(p, fx.Node) for p in parts) else []

    def averages(self, node: fx.Node) -> tuple[Any, bool] | None:
        """Dimensions that ``node`` takes the mean over, and whether they stay; None if it does no such thing."""
        if not calls(node, torch.mean, "mean"):
            return None
        dim, keep = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
        plain = all(map(_is_inside, dim if isinstance(dim, (list, tuple)) else (dim,))) and "dtype" not in node.kwargs
        return (tuple(dim) if isinstance(dim, list) else dim, keep) if plain else None

    def reshapes(self, node: fx.Node) -> bool:
        """Whether ``node``, which passes, has the values of its first argument in the same order and another shape."""
        return calls(node, *_RESHAPES) or isinstance(module_of(node, self.modules), (nn.Flatten, nn.Unflatten))

    def image_dims(self, scale: Scale) -> int:
        """Dimensions of the images, beside their channels, that the layer of a scale reads."""
        return self.modules[scale.layer]._dims  # type: ignore[return-value]

    def asks_size(self, node: object) -> bool:
        """Whether ``node`` looks at the shape of its argument only."""
        if calls(node, getattr):
            return node.args[1] in ("shape", "ndim")
        return calls(node, dynamic_padding, "size", "dim", "numel")

    def on_vectors(self) -> set[str]:
        """Layers that only ever see one pixel, a pooled image: squeeze-and-excite, where int8 gains nothing."""
        single: set[fx.Node] = set()
        found: dict[str, bool] = {}
        for node in self.graph.nodes:
            average = self.averages(node)
            site = self.sites.get(node)
            source = site.x if site is not None else node.args[0] if node.args else None
            if average is not None and average[1]:
                single.add(node)
            elif site is not None:
                pooled = source in single and max(self.modules[site.name].kernel_size) == 1  # type: ignore[arg-type]
                found[site.name] = pooled and found.get(site.name, True)
                if pooled and site.residual is None:
                    single.add(node)
            elif source in single and (self.passes(node) or activation_of(node, self.modules) is not None):
                single.add(node)
        return {name for name, pooled in found.items() if pooled}

    # ---- tensors that share a scale
    def leader(self, node: fx.Node) -> fx.Node:
        """One node that stands for all whose tensors share a scale with that of ``node``."""
        root = node
        while (above := self._leader.get(root, root)) is not root:
            root = above
        self._leader[node] = root
        return root

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        self._leader[self.leader(a)] = self.leader(b)

    def _unite(self) -> None:
        first: dict[tuple[str, str], fx.Node] = {}
        for node in self.graph.nodes:
            if self.passes(node):
                self._join(node, node.args[0])
            for part in self.joins(node):
                self._join(part, node)
            if (site := self.sites.get(node)) is not None:
                # A layer that is called twice has one scale for both inputs.
                self._join(site.x, first.setdefault((site.name, "x"), site.x))
                if site.residual is not None:
                    self._join(site.residual, first.setdefault((site.name, "r"), site.residual))

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Put ``new`` in the place of ``old``, with its scale."""
        self._leader[new] = self.leader(old)
        if old in self.stored_nodes:
            self.stored_nodes.add(new)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def ports(self) -> list[tuple[fx.Node, Scale]]:
        """Every tensor that an int8 convolution reads, and where its scale lives."""
        found = []
        for site in self.sites.values():
            found.append((site.x, Scale(site.name, "x")))
            if site.residual is not None:
                found.append((site.residual, Scale(site.name, "r")))
        return found

    # ---- storage
    def stored(self, scales: dict[fx.Node, Scale]) -> set[fx.Node]:
        """The nodes whose tensors are int8. scales: of those that have one, by leader."""
        required: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if self.leader(node) not in scales or self.asks_size(node):
                continue
            verdicts = [
                self._reads_int8(user, node, required, scales) for user in node.users if not self.asks_size(user)
            ]
            if verdicts and None not in verdicts and any(verdicts):
                required.add(node)
        stored = self.stored_nodes
        for node in self.graph.nodes:
            if node not in required:
                continue
            if node in self.sites or (
                (self.passes(node) and node.args[0] in stored)
                or any(part in stored for part in self.joins(node))
                or any(part in stored for part in addends(node) or ())
            ):
                stored.add(node)
        return stored

    def _reads_int8(
        self, user: fx.Node, node: fx.Node, required: set[fx.Node], scales: dict[fx.Node, Scale]
    ) -> bool | None:
        """Whether ``user`` gains by ``node`` being int8; None if it cannot take it."""
        if (site := self.sites.get(user)) is not None:
            supports = site.residual is not node or getattr(self.modules[site.name], "residual_scale", None) is not None
            return True if supports else None
        if self.averages(user) is not None:
            return user in required
        if self.passes(user) or self.joins(user) or addends(user) is not None:
            return True if user in required else None
        return None


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
    tensors = [node for node in stored if not calls(node, *_PARTS)]
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
