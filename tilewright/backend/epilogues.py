"""What follows a quantised linear layer moves into its operator: y = activation(x W^T + b) + residual."""

from __future__ import annotations

import torch
from torch import fx

from tilewright.backend.captured import (
    Captured,
    Order,
    bound,
    call_operator,
    only_reader,
    operator_of,
    residual_of,
    same_size,
)
from tilewright.convert.graph.patterns import activation_of, is_identity
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
    end, chain, words = node, [node], []
    while (user := only_reader(end)) is not None:
        other = residual_of(user, end)
        if is_identity(user, {}) and user.args[0] is end:
            word = ""
        elif arguments["activation"] == "none" and arguments["residual"] is None and _activation(user, end):
            word = _activation(user, end) or ""
        elif arguments["residual"] is None and other is not None:
            if not same_size(captured.value(other), captured.value(end)):
                break
            word = "residual"
        else:
            break
        if not order.undisturbed(node, user, [*chain, user]):
            break
        if word == "residual":
            arguments["residual"] = other
        elif word:
            arguments["activation"] = word
        words += [word] if word else []
        chain.append(user)
        end = user
    if not words:
        return False
    with captured.graph.inserting_before(end):
        new = call_operator(captured.graph, str(operator_of(node)), arguments, like=end)
    weight = arguments.get("weight", arguments.get("weight_packed"))
    name = captured.layer_of(weight) if isinstance(weight, fx.Node) else node.name
    end.replace_all_uses_with(new)
    for old in reversed(chain):
        captured.graph.erase_node(old)
    captured.report.add("epilogue", name, " + ".join(words))
    return True


def _activation(user: fx.Node, source: fx.Node) -> str | None:
    """What ``user`` applies to ``source``, if linear operators can."""
    found = activation_of(user, {})
    return found[0] if found is not None and found[0] in ACTIVATIONS and user.args[0] is source else None
