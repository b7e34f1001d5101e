"""Writes a graph as Python code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from typing import Any

from torch import fx


def source_of(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """Python code of ``def forward(self, ...)`` and the globals it uses."""
    code = graph.python_code("self")
    return code.src, dict(code.globals)


def compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function that ``source_of`` wrote."""
    space = dict(names)
    exec(source, space)
    return space["forward"]


def flattened(graph: fx.Graph, modules: Container[str]) -> tuple[fx.Graph, dict[str, str], list[str]]:
    """The graph with each submodule it uses as an attribute ``leaf_i`` of ``self``.

    Returns it, the name of each leaf's module, and the leaves that are called as modules.
    """
    flat = copy.deepcopy(graph)
    leaves: dict[str, str] = {}
    called = []

    def leaf(path: str) -> str:
        return leaves.setdefault(path, f"leaf_{len(leaves)}")

    for node in flat.nodes:
        target = str(node.target)
        if node.op == "call_module":
            node.target = leaf(target)
            called.append(node.target)
        elif node.op == "get_attr" and target in modules:
            node.target = leaf(target)
        elif node.op == "get_attr":
            prefix, _, attribute = target.rpartition(".")
            node.target = f"{leaf(prefix)}.{attribute}"
    return flat, {name: path for path, name in leaves.items()}, called
