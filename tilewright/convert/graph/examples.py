"""What the nodes of a graph give for one call, computed while the graph is made."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from tilewright.convert.graph.effects import Effect


class Examples:
    """The values of nodes. module: whose code is read. given: its inputs in that call, by name."""

    def __init__(self, module: nn.Module, given: Mapping[str, Any]):
        self.module, self.given = module, given
        self._values: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """What ``node`` gives."""
        return self._values[node]

    def compute(self, node: fx.Node, effect: Effect) -> str | None:
        """Compute ``node`` from those before it. Why it is not done, in words: it may have an effect that a second
        computation has again.
        """
        if effect.writes:
            return "forward writes into a tensor"
        if effect.unknown and node.op != "placeholder":
            return f"forward calls {node.target}, which may do anything"
        # What is computed here is no part of the graph.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._values[node] = self._value(node)
        return None

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.given[str(node.target)]
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self.module)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
