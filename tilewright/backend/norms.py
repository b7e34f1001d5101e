"""A norm that only int8 linear layers read becomes one that quantises: normalising and rounding in one pass.

The fused norm does not round its result to the dtype of x in between. It has no gradient, and it is taken only where
there is a kernel for it: on a CPU the int8 linear layers quantise for themselves, which is faster.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from tilewright.backend.captured import Captured, Order, bound, call_operator, operator_of
from tilewright.convert.graph import argument, calls
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.dispatch.router import route


@dataclass
class _Norm:
    """A norm in the graph. op: the fused operator. result: the node that has the normalised value."""

    op: str
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    result: fx.Node


def rewrite(captured: Captured) -> None:
    """Fuse every norm that can be."""
    for node in list(captured.graph.nodes):
        norm = _called(captured, node) or _written_out(captured, node)
        if norm is None:
            continue
        readers = list(norm.result.users)
        if not readers or not all(operator_of(user) == "int8_linear" for user in readers):
            continue
        calls = {user: bound(user) for user in readers}
        if any(call["x"] is not norm.result or list(call.values()).count(norm.result) > 1 for call in calls.values()):
            continue
        name = captured.layer_of(norm.weight) if norm.weight is not None else norm.result.name
        if reason := _why_not(captured, norm, calls):
            captured.report.left[name] = reason
            continue
        _fuse(captured, norm, calls, name)


def _why_not(captured: Captured, norm: _Norm, calls: dict[fx.Node, dict[str, Any]]) -> str | None:
    if captured.trains:
        return "gradients are on: a norm that quantises has none"
    scales = {call.get("channel_scale") for call in calls.values()}
    if len(scales) > 1:
        return "the layers that read it scale their inputs differently"
    if any(scale is not None and captured.weight(scale) is None for scale in scales):
        return "the scales of the layers that read it are computed"
    x = captured.value(norm.x)
    if not isinstance(x, torch.Tensor) or not x.dim():
        return "its input is no tensor"
    order = Order(captured.graph)
    if not all(order.undisturbed(norm.x, user, ()) for user in calls):
        return "its input may be overwritten before it is read"
    k = int(x.shape[-1])
    for op in (norm.op, "int8_linear_quantized"):
        # Shapes other than the width do not matter to whether there is a kernel.
        dtype = torch.int8 if op == "int8_linear_quantized" else x.dtype
        decision = route(Problem(op, 1024, k, k, dtype, **device_facts(x.device)))
        if decision.name == "reference":
            return f"no kernel but the definition would serve {op} on {x.device.type}"
    return None


def _fuse(captured: Captured, norm: _Norm, calls: dict[fx.Node, dict[str, Any]], name: str) -> None:
    graph, x = captured.graph, captured.value(norm.x)
    weight, bias = norm.weight, norm.bias
    scale = next(iter(calls.values())).get("channel_scale")
    if scale is not None:
        weight, bias = _scaled(captured, name, weight, bias, scale)
    arguments: dict[str, Any] = {"x": norm.x, "weight": weight, "eps": norm.eps}
    if norm.op == "layer_norm_quantize":
        arguments["bias"] = bias
    with graph.inserting_before(next(user for user in graph.nodes if user in calls)):
        quantized = call_operator(graph, norm.op, arguments)
        q = graph.call_function(operator.getitem, (quantized, 0))
        q_scale = graph.call_function(operator.getitem, (quantized, 1))
    q.meta["example_value"] = x.new_empty(x.shape, dtype=torch.int8)
    q_scale.meta["example_value"] = x.new_empty(x.shape[:-1], dtype=torch.float32)
    for user, call in calls.items():
        call = {key: value for key, value in call.items() if key != "channel_scale"}
        dtype = captured.value(user).dtype
        with graph.inserting_before(user):
            new = call_operator(
                graph, "int8_linear_quantized", {**call, "x": q, "x_scale": q_scale, "out_dtype": dtype}, like=user
            )
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    captured.report.add("norm", name, f"{norm.op} for {len(calls)} int8 linear layers")


def _scaled(
    captured: Captured, name: str, weight: fx.Node | None, bias: fx.Node | None, scale: fx.Node
) -> tuple[fx.Node | None, fx.Node | None]:
    """Weight and bias of a norm whose result is multiplied by ``scale``."""
    sources = [node for node in (scale, weight, bias) if node is not None]
    has_weight = weight is not None

    def make(factor: torch.Tensor, *affine: torch.Tensor) -> list[torch.Tensor]:
        scaled = [(each.float() * factor) for each in affine]
        return scaled if has_weight else [factor.clone(), *scaled]

    nodes = captured.prepare(f"{name}_scaled", sources, make)
    return nodes[0], nodes[1] if bias is not None else None


# ---- what a norm looks like
def _called(captured: Captured, node: fx.Node) -> _Norm | None:
    """A call of layer norm or RMS norm over the last dimension."""
    if not calls(node, F.layer_norm, F.rms_norm, torch.rms_norm):
        return None
    x, shape, weight = (argument(node, i, name) for i, name in enumerate(("input", "normalized_shape", "weight")))
    value = captured.value(x)
    if not isinstance(x, fx.Node) or not isinstance(value, torch.Tensor) or tuple(shape) != tuple(value.shape[-1:]):
        return None
    if node.target is F.layer_norm:
        op, bias, eps = "layer_norm_quantize", argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    else:
        op, bias, eps = "rms_norm_quantize", None, argument(node, 3, "eps")
        eps = torch.finfo(value.dtype).eps if eps is None else eps
    number = captured.number(eps)
    return None if number is None else _Norm(op, x, weight, bias, number, node)


def _written_out(captured: Captured, node: fx.Node) -> _Norm | None:
    """weight * (x * rsqrt(mean(x^2) + eps)), with casts to float32 and back, as transformers writes RMS norm."""
    for weight, normalised in _factors(node):
        if captured.weight(weight) is None:
            continue
        for x, factor in _factors(_uncast(normalised)):
            eps = _mean_square(captured, factor, x)
            if eps is not None:
                value = captured.value(node)
                source = _uncast(x)
                if getattr(captured.value(source), "dtype", None) != value.dtype:
                    return None
                return _Norm("rms_norm_quantize", source, weight, None, eps, node)
    return None


def _mean_square(captured: Captured, factor: Any, x: Any) -> float | None:
    """eps, if ``factor`` is rsqrt(mean(x^2, -1) + eps)."""
    if not calls(factor, torch.rsqrt, "rsqrt"):
        return None
    total = factor.args[0]
    if not calls(total, operator.add, torch.add, "add"):
        return None
    mean, eps = total.args[:2]
    number = captured.number(eps)
    if number is None or not calls(mean, torch.mean, "mean"):
        return None
    if argument(mean, 1, "dim") not in (-1, [-1], (-1,)) or argument(mean, 2, "keepdim") is not True:
        return None
    square = mean.args[0]
    squares = calls(square, torch.pow, operator.pow, "pow") and tuple(square.args[:2]) == (x, 2)
    return number if squares else None


def _factors(node: Any) -> list[tuple[fx.Node, fx.Node]]:
    """The two values that ``node`` multiplies, in both orders; nothing if it does something else."""
    if not calls(node, operator.mul, torch.mul, "mul") or len(node.args) != 2:
        return []
    a, b = node.args
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _uncast(node: Any) -> Any:
    """What a cast to another float dtype casts."""
    while calls(node, "float") or (calls(node, "to") and len(node.args) == 2 and isinstance(node.args[1], torch.dtype)):
        node = node.args[0]
    return node
