"""Finds what follows each convolution in a graph, and writes both as one call.

A chain is a convolution, what only it feeds (a batch-norm that is folded already, dropout), one addition and one
activation: ``conv -> add -> act``. Its calls are replaced by ``layer.run(x, residual, activation, slope, padding)``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tilewright.convert.graph import (
    Chain,
    Modules,
    Region,
    Writes,
    activates,
    added_to,
    calls,
    effect_of,
    follow,
    globally_pooled,
    is_norm,
    module_of,
    pads_by_input_size,
    reshape_views,
    settle,
    zero_padding,
)
from tilewright.convert.network.group_norms import centre_group_norms
from tilewright.nn import ConvLayer


def call_counts(regions: list[Region]) -> Counter[int]:
    """How often each module is called in the graphs of all regions, by ``id``."""
    counts: Counter[int] = Counter()
    for region in regions:
        parts = region.modules()
        counts.update(id(parts[str(node.target)]) for node in region.calls())
    return counts


def find_folds(
    region: Region, counts: Counter[int], outside: set[int], unread: str | None = None
) -> dict[nn.Module, nn.Module | str]:
    """For each convolution of ``region`` that is followed by batch-norm: the one to fold in, or why it is not folded.

    counts: of calls in all regions. outside: ``id`` of modules that are reached from somewhere else than this region.
    unread: code around the region that may read weights in it, if there is any.
    """
    modules = region.modules()
    read = {str(node.target).rpartition(".")[0] for node in region.graph.nodes if node.op == "get_attr"}
    sites: dict[nn.Module, list[fx.Node | None]] = {}
    for node in region.calls():
        conv = module_of(node, modules)
        if isinstance(conv, (nn.Conv1d, nn.Conv2d)):
            sites.setdefault(conv, []).append(_norm_after(node, modules))
    found: dict[nn.Module, nn.Module | str] = {}
    for conv, norms in sites.items():
        if not any(norms):
            continue
        kinds = {id(modules[str(node.target)]) if node is not None else None for node in norms}
        norm = next(modules[str(node.target)] for node in norms if node is not None)
        names = {str(node.target) for node in region.calls() if modules[str(node.target)] in (conv, norm)}
        if len(kinds) > 1:
            found[conv] = "it is called several times, with different batch-norms after it"
        elif counts[id(norm)] != len(norms) or counts[id(conv)] != len(norms):
            found[conv] = "its batch-norm is called from elsewhere as well"
        elif id(conv) in outside or id(norm) in outside:
            found[conv] = "it or its batch-norm is part of two modules"
        elif names & read:
            found[conv] = "forward reads its weight, which folding would change"
        elif unread is not None:
            found[conv] = f"forward of {unread}, which is no graph, reads weights, and folding would change this one"
        else:
            found[conv] = norm
    return found


def _norm_after(node: fx.Node, modules: Modules) -> fx.Node | None:
    """The call of a batch-norm that is all that reads the result of ``node``."""

    def norm(user: fx.Node, end: fx.Node) -> fx.Node | None:
        module = module_of(user, modules) if len(user.args) == 1 and not user.kwargs else None
        return user if module is not None and is_norm(module) else None

    return follow(node, {"norm": norm}, modules).norm


@dataclass
class Site:
    """One call of a convolution after the graph was rewritten. name: of the layer, relative to the region.

    call: the node ``layer.run(...)``. epilogue: what it takes over, for the report.
    """

    name: str
    call: fx.Node
    epilogue: tuple[str, ...]

    @property
    def x(self) -> fx.Node:
        """What it convolves."""
        return self.call.args[1]  # type: ignore[return-value]

    @property
    def residual(self) -> fx.Node | None:
        """What it adds."""
        return self.call.args[2]  # type: ignore[return-value]

    @property
    def activation(self) -> str:
        """What it applies."""
        return self.call.args[3]  # type: ignore[return-value]


#: Methods and functions whose answer depends on how a tensor lies in memory.
_LOOKING_AT_LAYOUT = (
    *("stride", "is_contiguous", "storage_offset", "data_ptr", "storage", "untyped_storage", "numpy"),
    *(form for name in ("as_strided", "view_as_real", "view_as_complex") for form in (name, getattr(torch, name))),
)


def match_layout(y: Any, like: Any) -> Any:
    """``y`` in the order that PyTorch gives results of a contiguous input ``like``: code outside may view them."""
    if isinstance(y, torch.Tensor) and isinstance(like, torch.Tensor) and like.is_contiguous():
        return y.contiguous()
    return y


def _lay_out(graph: fx.Graph, modules: Modules) -> None:
    """Give what leaves the graph, to its caller or to code that was not read, the layout it would have had."""
    first = next(node for node in graph.nodes if node.op == "placeholder")
    writes, order = Writes(graph, modules), list(graph.nodes)
    position = {node: i for i, node in enumerate(order)}
    done: set[fx.Node] = set()

    def lay_out(value: fx.Node, before: fx.Node, readers: list[fx.Node]) -> None:
        """Let ``readers`` read ``value`` in the order that it would have, a copy if need be."""
        if value.op not in ("placeholder", "get_attr") and not calls(value, match_layout):
            with graph.inserting_before(before):
                laid_out = graph.call_function(match_layout, (value, first))
            for reader in readers:
                reader.replace_input_with(value, laid_out)

    for node in order:
        unknown = effect_of(node, modules).unknown
        made = node.op == "call_function" and isinstance(node.target, type)
        if not (unknown or made or node.op == "output" or calls(node, *_LOOKING_AT_LAYOUT)):
            continue
        for value in node.all_input_nodes:
            if value.op == "call_function" and (isinstance(value.target, type) or value.target is match_layout):
                continue
            if not unknown:
                lay_out(value, node, [node])
            elif writes.other_name_read_after(value, node):
                # What is written to it is read by that name: there must be no copy between the two.
                for maker in set(writes.makers(value)) - done:
                    done.add(maker)
                    lay_out(maker, order[position[maker] + 1], list(maker.users))
            else:
                # What is written to it is read afterwards.
                lay_out(value, node, [user for user in value.users if position.get(user, -1) >= position[node]])


def rewrite(region: Region) -> list[Site]:
    """Replace every chain in the graph of ``region``, whose convolutions are ``ConvLayer``s already, by one call."""
    graph, modules = region.graph, region.modules()
    settle(graph, modules)
    reshape_views(graph)
    _global_pools_become_means(graph, modules)
    centre_group_norms(graph, modules)
    writes, sites = Writes(graph, modules), []
    for node in list(graph.nodes):
        layer = module_of(node, modules)
        if isinstance(layer, ConvLayer) and len(node.args) == 1 and not node.kwargs and layer.activation == "none":
            sites.append(_rewrite_chain(graph, node, layer, modules, writes))
    _lay_out(graph, modules)
    return sites


def _rewrite_chain(graph: fx.Graph, node: fx.Node, layer: ConvLayer, modules: Modules, writes: Writes) -> Site:
    before, padding = _with_padding_before(node, layer, modules, writes)
    x: fx.Node = node.args[0] if before is None else before.args[0]  # type: ignore[assignment]
    chain, place = _placed(before or node, node, x, modules, writes)
    with graph.inserting_before(place):
        self_node = graph.get_attr(str(node.target))
        if padding == "dynamic":
            padding = graph.call_function(dynamic_padding, (self_node, x))
        run = graph.call_method("run", (self_node, x, chain.residual, *chain.activation, padding))
    writes.add(run, chain.end, place)
    chain.replace(run)
    if before is not None:
        graph.erase_node(before)
    return Site(str(node.target), run, chain.words)


def _placed(start: fx.Node, node: fx.Node, x: fx.Node, modules: Modules, writes: Writes) -> tuple[Chain, fx.Node]:
    """What follows the convolution ``node``, and where to compute it all: where the chain ends, unless something writes
    to what is read in between; then where the convolution stands. start: where ``x`` is read.
    """
    activation = activates(modules)
    chain = follow(node, {"residual": added_to, "activation": activation}, modules)
    if chain.residual is None:
        return chain, node if writes.between(start, chain.end, [x], chain.nodes) else chain.end
    adds = next(each for each in chain.nodes if chain.residual in each.all_input_nodes)
    late = writes.between(start, chain.end, [x], chain.nodes) or writes.between(
        adds, chain.end, [chain.residual], chain.nodes
    )
    if not late:
        return chain, chain.end
    early = writes.stands_before(chain.residual, node)
    if early and not writes.between(node, adds, [chain.residual], chain.nodes):
        return chain, node
    return follow(node, {"activation": activation}, modules), node


def dynamic_padding(layer: ConvLayer, x: torch.Tensor) -> tuple[int, int, int, int]:
    """What TensorFlow's "SAME" pads at the top, bottom, left and right of ``x`` [N, C, H, W]."""
    return layer.same_padding_for(x.shape[2], x.shape[3])


def _with_padding_before(
    node: fx.Node, layer: ConvLayer, modules: Modules, writes: Writes
) -> tuple[fx.Node | None, Any]:
    """The node before the convolution that pads with zeros, if any, and what the layer pads in its place.

    None: the layer's own padding. "dynamic": by the size of the input.
    """
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    if len(x.users) != 1 or layer._padding is None or layer.origin != "Conv2d":
        return None, None
    dynamic = pads_by_input_size(x) is not None and not any(layer._padding)
    pads = None if dynamic else zero_padding(x, modules)
    if writes.between(x, node, x.args[:1], ()):  # type: ignore[arg-type]
        return None, None
    if pads is not None:
        return x, tuple(a + b for a, b in zip(pads, layer._padding, strict=True))
    return (x, "dynamic") if dynamic else (None, None)


def _global_pools_become_means(graph: fx.Graph, modules: Modules) -> None:
    """What PyTorch computes for them too, but as one operator and without a layout of its own."""
    for node in list(graph.nodes):
        if (source := globally_pooled(node, modules)) is not None:
            with graph.inserting_before(node):
                mean = graph.call_method("mean", (source, (-2, -1), True))
            node.replace_all_uses_with(mean)
            graph.erase_node(node)
