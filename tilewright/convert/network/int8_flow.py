"""Which tensors of a rewritten graph are kept in int8 between convolutions, and with whose scale.

A tensor is stored in int8 if an int8 convolution reads it and everything else that does can take it so: another
convolution (as its residual too), pooling, a reshape, a concatenation. Otherwise it stays float and is quantised once
for all int8 convolutions that read it. Scales live in the convolutions: the tensor that a layer convolves has the
layer's ``input_scale``, the one it adds its ``residual_scale``. Where a value passes through unchanged (pooling with a
maximum, a reshape, a concatenation) the tensors before and after share one scale. That holds what the convolutions were
seen to read, and cuts off what lies outside: a tensor in front of a ReLU, say, may be read in int8 through the ReLU
alone (``_within_scale``).

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
from tilewright.convert.network.match import Site, dynamic_padding

_PASSING_MODULES = (nn.MaxPool2d, nn.ReLU, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle)
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d)


def _forms(*names: str) -> tuple[Any, ...]:
    """The methods called so and the functions."""
    return tuple(form for name in names for form in (name, getattr(torch, name)))


def _is_inside(dim: object) -> bool:
    """Whether ``dim`` is surely another than the first one."""
    return isinstance(dim, int) and (dim > 0 or dim in (-1, -2))


_TURNS, PARTS = _forms("permute", "transpose"), _forms("chunk", "split")
#: Values stay in order, and may be another number of samples.
_RESHAPES = ("view", *_forms("reshape", "flatten", "squeeze", "unsqueeze"))
_PASSING = (
    *(*_MAX_POOLS, F.relu, torch.relu, "relu", "relu_", F.channel_shuffle, F.pixel_shuffle, "contiguous"),
    *(*_RESHAPES, *_TURNS, *PARTS),
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
        if calls(source, *PARTS):
            return isinstance(index, int)
        if not isinstance(index, tuple) or not index or self.asks_size(source):
            return False
        return bool(index[0] == slice(None)) or (index[0] is ... and len(index) < 4)

    def _keeps_samples(self, node: fx.Node) -> bool:
        """Whether the first dimension stays the first, and whole."""
        if calls(node, *PARTS):
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
        within = self._within_scale()
        for node in reversed(self.graph.nodes):
            if self.leader(node) not in scales or self.asks_size(node):
                continue
            verdicts = [
                self._reads_int8(user, node, required, within) for user in node.users if not self.asks_size(user)
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

    def _within_scale(self) -> set[fx.Node]:
        """The tensors of which all values lie in the range of their scale: those that an int8 convolution reads, what
        passes values of these on, and what is passed on to them whole.
        """
        within = {node for node, _ in self.ports()}
        before = -1
        while len(within) != before:
            before = len(within)
            for node in self.graph.nodes:
                parts = self.joins(node)
                sources = parts or (list(node.args[:1]) if self.passes(node) else [])
                if sources and all(source in within for source in sources):
                    within.add(node)
                if node in within and (parts or self._keeps_values(node)):
                    within.update(sources)
        return within

    def _keeps_values(self, node: fx.Node) -> bool:
        """Whether all values of the first argument of ``node``, which passes, are still there."""
        other = calls(node, operator.getitem, *PARTS) or self.max_window(node) is not None
        return self.passes(node) and not other and activation_of(node, self.modules) is None

    def _reads_int8(self, user: fx.Node, node: fx.Node, required: set[fx.Node], within: set[fx.Node]) -> bool | None:
        """Whether ``user`` gains by ``node`` being int8; None if it cannot take it. within: as of ``_within_scale``."""
        if (site := self.sites.get(user)) is not None:
            supports = site.residual is not node or getattr(self.modules[site.name], "residual_scale", None) is not None
            return True if supports else None
        if self.averages(user) is not None:
            return user in required if node in within else None
        if addends(user) is not None:
            return True if user in required and node in within else None
        if self.passes(user) or self.joins(user):
            return True if user in required else None
        return None
