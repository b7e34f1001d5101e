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

from tilewright.nn import ConvLayer, FoldedBatchNorm, FusedActivation, QuantizedLinear

_LAYERS = (
    ConvLayer,
    FoldedBatchNorm,
    FusedActivation,
    QuantizedLinear,
    nn.Linear,
    nn.Identity,
    nn.Dropout,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.SiLU,
    nn.Sigmoid,
)
#: Beside Tilewright's own. Those of the first line read attributes and shapes.
_FUNCTIONS = {
    *(getattr, operator.getitem, operator.eq, operator.ne),
    operator.add,
    operator.iadd,
    torch.add,
    torch.flatten,
    torch.relu,
    F.relu,
    F.adaptive_avg_pool2d,
}
#: "run" is that of a convolution.
_METHODS = ("run", "size", "dim", "add", "flatten", "relu", "mean")
_RESULTS = ("call_module", "call_function", "call_method")


def runs_whole(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``graph`` makes one tensor of tensors by nothing but what the C kernels know, and views.

    modules: by the names that the graph uses.
    """
    for node in graph.nodes:
        if node.op == "placeholder":
            known = not node.args
        elif node.op == "call_module":
            known = isinstance(modules[str(node.target)], _LAYERS)
        elif node.op == "call_function":
            known = node.target in _FUNCTIONS or str(getattr(node.target, "__module__", "")).startswith("tilewright.")
        elif node.op == "call_method":
            known = node.target in _METHODS
        elif node.op == "output":
            result = node.args[0]
            known = isinstance(result, fx.Node) and result.op in _RESULTS and result.target is not getattr
        else:
            known = True
        if not known:
            return False
    return True


def supports(inputs: Sequence[Any]) -> bool:
    """Whether this call, which is being compiled, may be one operator: nothing is exported, differentiated or cast."""
    return (
        not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in inputs)
    )
