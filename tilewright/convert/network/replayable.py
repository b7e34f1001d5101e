"""Which programs a compiler should call as they are: those that replay as C calls from end to end.

Operator by operator, a compiler calls each convolution by itself, and plans no memory for what comes out. Where the
program has nothing that a compiler could make better, it is one operator of the compiled graph:
``kernels.dispatch.regions``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tilewright.convert.graph import calls, is_kept
from tilewright.kernels.dispatch.derivatives import is_transformed
from tilewright.nn import ConvLayer, FoldedBatchNorm, FusedActivation, QuantizedLinear

_OURS = (ConvLayer, FoldedBatchNorm, FusedActivation, QuantizedLinear)
_PLAIN = (nn.Linear, nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.Sigmoid)
#: Functions, and methods by their names; "run" is that of a convolution.
_READING = (getattr, operator.getitem, operator.eq, operator.ne, "size", "dim")
_COMPUTING = (
    *(operator.add, operator.iadd, torch.add, "add", torch.flatten, "flatten", torch.relu, F.relu, "relu"),
    *(F.adaptive_avg_pool2d, "mean", "run"),
)
_RESULTS = ("call_module", "call_function", "call_method")


def runs_whole(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``graph`` makes one tensor of tensors by nothing but what the C kernels know, and views.

    modules: by the names that the graph uses.
    """
    return all(_is_known(node, modules) and not is_kept(node) for node in graph.nodes)


def _is_known(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "placeholder":
        return not node.args
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], (*_OURS, *_PLAIN, *_ACTIVATIONS))
    if node.op == "output":
        result = node.args[0]
        return isinstance(result, fx.Node) and result.op in _RESULTS and result.target is not getattr
    ours = str(getattr(node.target, "__module__", "")).startswith("tilewright.")
    return node.op == "get_attr" or ours or calls(node, *_READING, *_COMPUTING)


def supports(inputs: Sequence[Any]) -> bool:
    """Whether this call, which is being compiled, may be one operator: nothing is exported, differentiated or cast."""
    return (
        not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not is_transformed()
        and not torch.is_autocast_enabled("cpu")
        and all(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in inputs)
    )
