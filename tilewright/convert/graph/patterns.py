"""What a node of a traced graph computes, whichever of PyTorch's ways of saying it was used."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.convert.graph.leaves import SAME_PADDING_FUNCTIONS, has_hooks
from tilewright.kernels.activation import called_activation, module_activation
from tilewright.nn import FoldedBatchNorm, FusedActivation

Modules = Mapping[str, nn.Module]
#: An epilogue's name for an activation, and the slope of a leaky ReLU.
Activation = tuple[str, float]

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", "__radd__")
_IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def module_of(node: fx.Node, modules: Modules) -> nn.Module | None:
    """The module that a node calls, if it calls one that no hook watches."""
    if node.op != "call_module":
        return None
    module = modules.get(str(node.target))
    return None if module is None or has_hooks(module) else module


def calls(node: object, *forms: object) -> TypeGuard[fx.Node]:
    """Whether ``node`` calls one of ``forms``: functions, and methods by their names."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in forms


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def activation_of(node: fx.Node, modules: Modules) -> Activation | None:
    """The activation that ``node`` applies to its first argument, or None."""
    module = module_of(node, modules)
    if module is not None:
        return None if len(node.args) != 1 or node.kwargs else module_activation(module)
    if node.op in ("call_function", "call_method") and node.args:
        return called_activation(node.target, *node.args[1:], **node.kwargs)
    return None


def addends(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that ``node`` adds, if it adds two and nothing else."""
    if not calls(node, *_ADDITIONS) or node.kwargs.get("alpha", 1) != 1 or "out" in node.kwargs:
        return None
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def is_identity(node: fx.Node, modules: Modules) -> bool:
    """Whether ``node`` passes its first argument on unchanged, in eval mode."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    module = module_of(node, modules)
    if module is not None:
        if len(node.args) != 1 or node.kwargs:
            return False
        if isinstance(module, FoldedBatchNorm):
            return module.then is None
        return isinstance(module, (FusedActivation, *_IDENTITIES))
    return (
        calls(node, *_DROPOUTS) and argument(node, 2, "training", node.target is not F.feature_alpha_dropout) is False
    )


def zero_padding(node: fx.Node, modules: Modules) -> tuple[int, int, int, int] | None:
    """Top, bottom, left, right of the zeros that ``node`` puts around its first argument, or None."""
    module = module_of(node, modules)
    if isinstance(module, (nn.ZeroPad2d, nn.ZeroPad1d)):
        pads: Any = module.padding
    elif isinstance(module, (nn.ConstantPad2d, nn.ConstantPad1d)) and module.value == 0:
        pads = module.padding
    elif calls(node, F.pad):
        if argument(node, 2, "mode", "constant") != "constant" or argument(node, 3, "value") not in (None, 0, 0.0):
            return None
        pads = argument(node, 1, "pad")
    else:
        return None
    if not isinstance(pads, (tuple, list)) or not all(isinstance(each, int) and each >= 0 for each in pads):
        return None
    if len(pads) == 2:
        return 0, 0, pads[0], pads[1]
    return (pads[2], pads[3], pads[0], pads[1]) if len(pads) == 4 else None


def globally_pooled(node: fx.Node, modules: Modules) -> fx.Node | None:
    """The image that ``node`` averages into one pixel, if it does."""
    module, sizes = module_of(node, modules), None
    if isinstance(module, nn.AdaptiveAvgPool2d) and type(module).forward is nn.AdaptiveAvgPool2d.forward:
        sizes = module.output_size
    elif calls(node, F.adaptive_avg_pool2d):
        sizes = argument(node, 1, "output_size")
    source = node.args[0] if node.args else None
    return source if sizes in (1, (1, 1), [1, 1]) and isinstance(source, fx.Node) else None


def pads_by_input_size(node: fx.Node) -> fx.Node | None:
    """What ``node`` pads as TensorFlow's "SAME" does, for the convolution that is its second argument."""
    pads = getattr(node.target, "__name__", "") in SAME_PADDING_FUNCTIONS
    return node.args[0] if pads and isinstance(node.args[0], fx.Node) else None


def reshape_views(graph: fx.Graph) -> None:
    """A convolution's result is channels-last, of which a view may not exist where one of a contiguous tensor did."""
    for node in graph.nodes:
        arguments = (*node.args, *node.kwargs.values())
        if calls(node, "view", "view_as") and not any(isinstance(each, torch.dtype) for each in arguments):
            node.target = {"view": "reshape", "view_as": "reshape_as"}[str(node.target)]
