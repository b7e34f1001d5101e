"""``conv -> batch-norm -> add -> activation`` becomes one ``conv2d_fused``, the batch-norm folded into the weight.

Each node is float arithmetic that the fused operator does too, so only rounding changes. Folding makes a new weight
from the parameters, which no gradient would reach: where gradients are on, convolutions stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.backend.captured import Captured, Order, call_operator, holding
from tilewright.convert.graph import Match, Part, Untraceable, activates, argument, calls, follow, reshape_views, settle
from tilewright.convert.plan import Planned, decide
from tilewright.convert.recipes import Recipe
from tilewright.convert.schemes.convolution import Fuse
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.convolution import convolution_problem
from tilewright.kernels.dispatch.problem import device_facts
from tilewright.kernels.dispatch.router import route
from tilewright.nn.conv_layer import ANY_IMAGE, folded, same_padding

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_NEEDS_DATA = "static int8 needs calibration data, which convert_model takes: fused in float"


def rewrite(captured: Captured, recipe: Recipe | None, exclude: tuple[str, ...]) -> None:
    """Fuse every convolution that can be."""
    nodes = [node for node in captured.graph.nodes if calls(node, *CONVOLUTIONS)]
    if not nodes:
        return
    try:
        settle(captured.graph, {}, inputs_overlap=False)
    except Untraceable as error:
        names = {
            captured.layer_of(weight) for node in nodes if isinstance(weight := argument(node, 1, "weight"), fx.Node)
        }
        captured.report.left.update(dict.fromkeys(names, error.reason))
        return
    order = Order(captured.graph)
    asked = Recipe.of("fuse").excluding((*(recipe.exclude if recipe else ()), *exclude))
    fused = False
    for node in nodes:
        convolution = _Convolution(captured, node)
        name = captured.layer_of(convolution.weight) if isinstance(convolution.weight, fx.Node) else node.name
        if reason := convolution.why_not() or _excluded(convolution, name, asked, recipe):
            captured.report.left[name] = reason
            continue
        convolution.fuse(name, order)
        if recipe is not None and _asks_int8(convolution, name, recipe):
            captured.report.notes.append(f"{name}: {_NEEDS_DATA}")
        fused = True
    if fused:
        _restore_layouts(captured)


def _excluded(convolution: _Convolution, name: str, asked: Recipe, recipe: Recipe | None) -> str | None:
    """Why the user's rules leave it alone."""
    module = convolution.stand_in()
    decided = decide(module, [name], asked, None, None, {})
    if isinstance(decided, str):
        return decided
    if recipe is not None:
        required = decide(module, [name], recipe, None, None, {})
        if isinstance(required, str) and required.startswith("left alone by"):
            return required
    return None


def _asks_int8(convolution: _Convolution, name: str, recipe: Recipe) -> bool:
    decided = decide(convolution.stand_in(), [name], recipe, None, None, {})
    return isinstance(decided, Planned) and not isinstance(decided.scheme, Fuse)


class _Convolution:
    def __init__(self, captured: Captured, node: fx.Node):
        self.captured, self.node = captured, node
        self.x, self.weight, self.bias = (argument(node, i, n) for i, n in enumerate(("input", "weight", "bias")))
        defaults = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
        self.stride, self.padding, self.dilation, self.groups = (
            argument(node, 3 + i, name, default) for i, (name, default) in enumerate(defaults)
        )

    def why_not(self) -> str | None:
        """Why it is not fused, or None."""
        captured, x = self.captured, self.captured.value(self.x)
        weight, bias = captured.weight(self.weight), captured.weight(self.bias)
        if self.node.target is not F.conv2d:
            return f"{self.node.target.__name__}: only two-dimensional convolutions are fused here"  # type: ignore[union-attr]
        if captured.trains:
            return "gradients are on: fused only under torch.no_grad() or torch.inference_mode()"
        if weight is None or (self.bias is not None and bias is None):
            return "its weight is computed"
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            return "its input is no batch of images"
        result = captured.value(self.node)
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.dtype != weight.dtype:
            return f"its input is {x.dtype}, its weight {weight.dtype}"
        if getattr(result, "dtype", None) != weight.dtype:
            return "autocast is on"
        if type(weight) not in (torch.Tensor, nn.Parameter):
            return f"its weight is a {type(weight).__name__}"
        if not isinstance(self.groups, int) or None in self._window(weight):
            return "its geometry is not constant"
        return self._unserved(x, weight)

    def _unserved(self, x: torch.Tensor, weight: torch.Tensor) -> str | None:
        """Asks the router at a guess of the sizes, which do not matter to whether there is a kernel."""
        batch, channels, height, width = (size if isinstance(size, int) else 64 for size in x.shape)
        kernel = (weight.shape[2], weight.shape[3])
        geometry = ConvGeometry(batch, channels, height, width, weight.shape[0], kernel, *self._window(weight))
        decision = route(convolution_problem("conv2d_fused", geometry, x.dtype, x.dtype, **device_facts(x.device)))
        return f"no kernel but the definition would serve it: {decision}" if decision.name == "reference" else None

    def _pads(self, weight: torch.Tensor) -> tuple[int, int, int, int] | None:
        """Top, bottom, left, right."""
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding == "same":
            return same_padding(ANY_IMAGE, weight.shape[2:], (1, 1), _pair(self.dilation) or (0, 0))
        pair = _pair(self.padding)
        return None if pair is None else (pair[0], pair[0], pair[1], pair[1])

    def stand_in(self) -> nn.Conv2d:
        """A module that looks like this convolution, for those who ask one; its weight is the real one."""
        weight, bias = self.captured.weight(self.weight), self.captured.weight(self.bias)
        return _conv_around(weight, bias, self.groups)  # type: ignore[arg-type]

    def fuse(self, name: str, order: Order) -> None:
        """Replace it and what follows it."""
        captured, graph = self.captured, self.captured.graph
        parts: dict[Part, Match] = {
            "norm": lambda user, end: user if self._is_norm(user, end) else None,
            "residual": captured.added,
            "activation": activates({}),
        }
        chain = follow(self.node, parts, {}, order.may_move_to(self.node))
        weight, bias = self._prepared(name, chain.norm)
        arguments = {"x": self.x, "weight": weight, "bias": bias, "residual": chain.residual}
        window = self._window(captured.weight(self.weight))  # type: ignore[arg-type]
        arguments |= zip(("stride", "padding", "dilation", "groups"), window, strict=True)
        arguments |= zip(("activation", "negative_slope"), chain.activation, strict=True)
        with graph.inserting_before(chain.end):
            chain.replace(call_operator(graph, "conv2d_fused", arguments, like=chain.end))
        captured.report.add("convolution", name, " + ".join(("conv", *chain.words)))

    def _window(self, weight: torch.Tensor) -> tuple[Any, Any, Any, int]:
        """Stride, padding, dilation and groups."""
        return _pair(self.stride), self._pads(weight), _pair(self.dilation), self.groups

    def _is_norm(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether it is a batch-norm with running statistics of ``source``."""
        if not calls(node, F.batch_norm) or argument(node, 0, "input") is not source:
            return False
        if argument(node, 5, "training", False) is not False:
            return False
        captured, (mean, variance) = self.captured, (argument(node, i, n) for i, n in _STATISTICS)
        affine = [argument(node, i, n) for i, n in _AFFINE]
        known = [captured.weight(mean), captured.weight(variance)]
        known += [captured.weight(each) for each in affine if each is not None]
        return all(each is not None for each in known) and captured.number(argument(node, 7, "eps", 1e-5)) is not None

    def _prepared(self, name: str, norm: fx.Node | None) -> tuple[fx.Node, fx.Node | None]:
        """Inputs of the graph for the folded weight and bias."""
        groups = self.groups
        roles: dict[str, Any] = {"weight": self.weight, "bias": self.bias}
        eps = 0.0
        if norm is not None:
            eps = self.captured.number(argument(norm, 7, "eps", 1e-5)) or 0.0
            roles |= {f"norm.{n}": argument(norm, i, n) for i, n in (*_STATISTICS, *_AFFINE)}
        names = [role for role, node in roles.items() if node is not None]

        def make(*tensors: torch.Tensor) -> list[torch.Tensor]:
            given = dict(zip(names, tensors, strict=True))
            after = None
            if norm is not None:
                of_norm = {n: given.get(f"norm.{n}") for _, n in (*_STATISTICS, *_AFFINE)}
                after = types.SimpleNamespace(**of_norm, eps=eps)
            weight, bias = folded(_conv_around(given["weight"], given.get("bias"), groups), after)  # type: ignore[arg-type]
            return [weight] if bias is None else [weight, bias]

        nodes = self.captured.prepare(name, [roles[role] for role in names], make)
        return nodes[0], nodes[1] if len(nodes) > 1 else None


_STATISTICS = ((1, "running_mean"), (2, "running_var"))
_AFFINE = ((3, "weight"), (4, "bias"))


def _pair(value: Any) -> tuple[int, int] | None:
    values = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    values = values * 2 if len(values) == 1 else values
    return values if len(values) == 2 and all(isinstance(each, int) for each in values) else None


def _conv_around(weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> nn.Conv2d:
    out_channels, channels, *window = weight.shape
    options: dict[str, Any] = {"kernel_size": tuple(window), "groups": groups, "bias": bias is not None}
    return holding(nn.Conv2d(channels * groups, out_channels, **options, device="meta"), weight, bias)


def _restore_layouts(captured: Captured) -> None:
    """The fused operator gives channels-last results. Let nobody see that where there was another order before."""
    reshape_views(captured.graph)
    for node in list(captured.graph.nodes):
        if node.op == "output" or str(node.target).rpartition(".")[2] in ("as_strided", "view_as", "stride"):
            inner = {value: _in_order(captured, value, node) for value in node.all_input_nodes}
            node.args = fx.map_arg(node.args, inner.__getitem__)
            node.kwargs = fx.map_arg(node.kwargs, inner.__getitem__)


def _in_order(captured: Captured, value: fx.Node, before: fx.Node) -> fx.Node:
    held = captured.value(value)
    if value.op == "placeholder" or not isinstance(held, torch.Tensor) or held.dim() != 4 or not held.is_contiguous():
        return value
    with captured.graph.inserting_before(before):
        return captured.graph.call_method("contiguous", (value,))
