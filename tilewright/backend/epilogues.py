"""What follows a quantised linear layer moves into its operator: y = activation(x W^T + b) + residual."""

from __future__ import annotations

import torch
from torch import fx

from tilewright.backend.captured import Captured, Order, bound, call_operator, operator_of
from tilewright.convert.graph import Match, Part, activates, follow
from tilewright.kernels.activation import ACTIVATIONS


def rewrite(captured: Captured) -> None:
    """Pull activation and residual into every linear operator that has a place for them."""
    order: Order | None = None
    for node in list(captured.graph.nodes):
        if has_epilogue(node):
            order = order or Order(captured.graph)
            if _absorb(captured, node, order):
                order = None  # positions have changed


def has_epilogue(node: fx.Node) -> bool:
    """Whether ``node`` calls a linear operator of Tilewright."""
    name = operator_of(node)
    if name is None or not name.endswith(("linear", "linear_quantized")):
        return False
    names = {a.name for a in getattr(torch.ops.tilewright, name).default._schema.arguments}
    return {"activation", "residual"} <= names


def _absorb(captured: Captured, node: fx.Node, order: Order) -> bool:
    arguments = bound(node)
    parts: dict[Part, Match] = {}
    if arguments["residual"] is None:
        if arguments["activation"] == "none":
            parts["activation"] = activates({}, ACTIVATIONS)
        parts["residual"] = captured.added
    chain = follow(node, parts, {}, order.may_move_to(node))
    if not chain.words:
        return False
    if chain.activation[0] != "none":
        arguments["activation"] = chain.activation[0]
    if chain.residual is not None:
        arguments["residual"] = chain.residual
    weight = arguments.get("weight", arguments.get("weight_packed"))
    name = captured.layer_of(weight) if isinstance(weight, fx.Node) else node.name
    with captured.graph.inserting_before(chain.end):
        chain.replace(call_operator(captured.graph, str(operator_of(node)), arguments, like=chain.end))
    words = ("residual" if word == "add" else word for word in chain.words)
    captured.report.add("epilogue", name, " + ".join(words))
    return True
