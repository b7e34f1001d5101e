"""Linear layers become their quantised operators, if a recipe asks for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.backend.captured import Captured, call_operator, holding, plain_arithmetic
from tilewright.convert import structure
from tilewright.convert.graph import argument, calls
from tilewright.convert.plan import Planned, decide
from tilewright.convert.recipes import Recipe
from tilewright.convert.schemes.convolution import ConvScheme
from tilewright.convert.structure import tensor_bytes
from tilewright.nn import QuantizedLinear
from tilewright.nn.weight_holder import stored_name

NO_RECIPE = "no recipe was given: float linear layers are Inductor's"


class _Call:
    """One linear layer in the graph. transposed: the weight is [in, out], as ``torch.addmm`` takes it."""

    def __init__(self, node: fx.Node):
        self.node = node
        self.transposed = node.target is torch.addmm
        names = ("input", "mat1", "mat2") if self.transposed else ("input", "weight", "bias")
        operands: list[Any] = [argument(node, i, name) for i, name in enumerate(names)]
        first, second, third = operands
        self.x, self.weight, self.bias = (second, third, first) if self.transposed else (first, second, third)

    @property
    def plain(self) -> bool:
        """Whether it is a product and a sum and nothing else."""
        return not set(self.node.kwargs) & {"alpha", "beta", "out"}


def stand_in(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool = False) -> nn.Linear:
    """An ``nn.Linear`` around a weight, for those who ask a module."""
    matrix = weight.t() if transposed else weight
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta", dtype=matrix.dtype)
    return holding(linear, matrix, bias)


def rewrite(captured: Captured, recipe: Recipe | None, heads: bool) -> None:
    """Replace every linear layer that ``recipe`` has a scheme for."""
    made: dict[fx.Node, tuple[QuantizedLinear, dict[str, fx.Node]]] = {}
    for node in list(captured.graph.nodes):
        if calls(node, F.multi_head_attention_forward):
            name = captured.layer_of(argument(node, 11, "out_proj_weight", node)).removesuffix(".out_proj")
            captured.report.left[name] = "nn.MultiheadAttention reads the weights of its layers instead of calling them"
        if not calls(node, F.linear, torch.addmm):
            continue
        call = _Call(node)
        weight, bias = captured.weight(call.weight), captured.value(call.bias)
        if weight is None or weight.dim() != 2 or not call.plain:
            continue
        if call.bias is not None and not (isinstance(bias, torch.Tensor) and bias.dim() == 1):
            continue
        name = captured.layer_of(call.weight)
        if recipe is None:
            captured.report.left[name] = NO_RECIPE
            continue
        if call.weight not in made:
            built = _build(captured, call, weight, name, recipe, heads)
            if built is None:
                continue
            made[call.weight] = built
        _replace(captured, call, *made[call.weight])


def _build(
    captured: Captured, call: _Call, weight: torch.Tensor, name: str, recipe: Recipe, heads: bool
) -> tuple[QuantizedLinear, dict[str, fx.Node]] | None:
    """The quantised layer, and inputs of the graph for its tensors by name; None if it is left alone."""
    linear = stand_in(weight, None, call.transposed)
    last = name.rpartition(".")[2]
    head = f"it is called {last!r}" if last in structure.HEAD_NAMES and not heads else None
    planned = decide(linear, [name], recipe, None, head, {})
    if isinstance(planned, Planned) and isinstance(planned.scheme, ConvScheme):
        planned = "no rule of the recipe matches it"
    if isinstance(planned, Planned) and not planned.explicit and _is_shared(call.weight):
        planned = "its weight is read by something else too, as tied embeddings are"
    if isinstance(planned, str):
        captured.report.left[name] = planned
        return None
    with plain_arithmetic():
        built = planned.scheme.build(linear)
    if not isinstance(built, QuantizedLinear):
        captured.report.left[name] = f"{planned.scheme} makes a {type(built).__name__}, which is no single operator"
        return None
    if tensor_bytes(built) >= tensor_bytes(linear) and not planned.explicit:
        captured.report.left[name] = f"too small to pay: {tensor_bytes(linear)} bytes would be {tensor_bytes(built)}"
        return None
    names = [each for each, value in built.named_buffers(recurse=False) if value is not None]

    def make(again: torch.Tensor) -> list[torch.Tensor]:
        with plain_arithmetic():
            module = planned.scheme.build(stand_in(again, None, call.transposed))
        return [module.get_buffer(each) for each in names]

    nodes = captured.prepare(name, [call.weight], make, [built.get_buffer(each) for each in names])
    captured.report.add("linear", name, str(planned.scheme))
    if captured.trains and weight.requires_grad:
        captured.report.notes.append(f"{name}: gradients are on, but a quantised weight gets none")
    return built, dict(zip(names, nodes, strict=True))


def _is_shared(weight: fx.Node) -> bool:
    return any(user.target not in (F.linear, torch.addmm) for user in weight.users)


def _replace(captured: Captured, call: _Call, built: QuantizedLinear, tensors: dict[str, fx.Node]) -> None:
    operator = getattr(torch.ops.tilewright, built.op_name).default
    arguments: dict[str, Any] = {"x": call.x, "bias": call.bias}
    for declared in operator._schema.arguments:
        name, held = declared.name, stored_name(declared.name)
        if held in tensors:
            arguments[name] = tensors[held]
        elif name not in arguments and name != "residual" and hasattr(built, held):
            arguments[name] = getattr(built, held)
    with captured.graph.inserting_before(call.node):
        new = call_operator(captured.graph, built.op_name, arguments, like=call.node)
    call.node.replace_all_uses_with(new)
    captured.graph.erase_node(call.node)
