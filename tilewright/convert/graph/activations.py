"""Activations that follow a quantised linear layer move into its epilogue, which saves a pass over the layer's output.

Whether an activation really follows, and nothing else reads what it reads, is not guessed from names: the ``forward``
of the module that holds both is read with its children as opaque calls. What cannot be read is left as it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from torch import fx, nn

from tilewright.convert.graph.capture import Capture, arguments_of
from tilewright.convert.graph.chain import activates, follow
from tilewright.convert.graph.leaves import has_hooks
from tilewright.convert.graph.memory import settle
from tilewright.convert.graph.values import Untraceable
from tilewright.convert.record import join
from tilewright.convert.structure import held_beside
from tilewright.kernels.activation import ACTIVATIONS, module_activation
from tilewright.nn import FusedActivation, QuantizedLinear

logger = logging.getLogger("tilewright")


def activation_name(module: nn.Module) -> str | None:
    """The name of what ``module`` computes if linear operators have it, else None."""
    found = module_activation(module)
    return found[0] if found is not None and found[0] in ACTIVATIONS else None


def fuse_activations(model: nn.Module) -> dict[str, str]:
    """Fuse every activation that can be, in place. Returns the name of each such activation and of its layer."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values() if child is not None)
    places.update(id(each) for module in model.modules() for found in held_beside(module).values() for each in found)
    fused = {}
    for prefix, parent in model.named_modules():
        children = parent._modules
        candidates = {name: child for name, child in children.items() if child is not None and _can_move(child, places)}
        if candidates and any(_can_take(child, places) for child in children.values()):
            for name, source in _fuse_in(parent, candidates, places).items():
                fused[join(prefix, name)] = join(prefix, source)
    if fused:
        logger.debug("fused %d activations into the linear layers before them", len(fused))
    return fused


def _can_move(module: nn.Module, places: Counter[int]) -> bool:
    return activation_name(module) is not None and places[id(module)] == 1 and not has_hooks(module)


def _can_take(module: nn.Module | None, places: Counter[int]) -> bool:
    if not isinstance(module, QuantizedLinear) or module.activation != "none":
        return False
    return places[id(module)] == 1 and not has_hooks(module)


def _fuse_in(parent: nn.Module, candidates: dict[str, nn.Module], places: Counter[int]) -> dict[str, str]:
    graph = _trace(parent)
    if graph is None:
        return {}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    movable = {name: module for name, module in candidates.items() if calls[name] == 1}
    fused = {}
    for node in graph.nodes:
        linear = parent._modules.get(str(node.target)) if node.op == "call_module" and calls[node.target] == 1 else None
        if not isinstance(linear, QuantizedLinear) or not _can_take(linear, places):
            continue
        chain = follow(node, {"activation": activates(movable, ACTIVATIONS)}, None)
        name = str(chain.end.target)
        if chain.words and chain.end.op == "call_module":
            FusedActivation.put(parent, name, str(node.target), chain.activation[0])
            fused[name] = str(node.target)
    return fused


def _trace(parent: nn.Module) -> fx.Graph | None:
    """The graph of ``parent.forward`` with every child as a call, or None if it cannot be read."""
    try:
        inputs, _ = arguments_of(parent)
        capture = Capture(parent, lambda part, path: True)
        graph = capture.run(inputs)
        settle(graph, capture.modules)
    except Untraceable as error:
        reason = f"{type(parent).__name__} cannot be read, so no activation in it is fused: {error.reason}"
        logger.debug("%s", reason)
        return None
    return graph


def fuse_named(model: nn.Module, fused: Mapping[str, str]) -> None:
    """Put ``FusedActivation`` where a checkpoint says that there is one. Its layer knows the activation already.

    fused: as ``fuse_activations`` returns it. Raises ValueError if the model has no such activation or layer.
    """
    modules = dict(model.named_modules())
    for name, source in fused.items():
        owner, _, attribute = name.rpartition(".")
        source_owner, _, source_attribute = source.rpartition(".")
        activation, linear = modules.get(name), modules.get(source)
        if activation is None or activation_name(activation) is None:
            raise ValueError(f"the model has no activation {name!r} that a layer could take over")
        if owner != source_owner or not isinstance(linear, QuantizedLinear):
            raise ValueError(f"the model has no converted layer {source!r} beside the activation {name!r}")
        if linear.activation != activation_name(activation):
            raise ValueError(
                f"layer {source!r} ends in {linear.activation}, but {name!r} is {activation_name(activation)}"
            )
        FusedActivation.put(modules[owner], attribute, source_attribute, linear.activation)


def unfuse_activations(model: nn.Module, only: nn.Module | None = None) -> None:
    """Put every fused activation back and take it from the layer that had it, in place. only: from this layer."""
    for parent in list(model.modules()):
        FusedActivation.take_back(parent, only)


def fused_activations(model: nn.Module) -> dict[str, str]:
    """The name of each fused activation in ``model``, and of its layer."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FusedActivation)}
    return {name: join(name.rpartition(".")[0], module.source) for name, module in found.items()}
