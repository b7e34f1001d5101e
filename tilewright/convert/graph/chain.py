"""What follows a node of a graph and nothing else reads: batch-norm, an addition, an activation, in a given order.

One walk serves every rewrite that moves such a chain into the operator before it. What an operator may take, and in
which order, is the caller's: ``conv -> norm -> add -> activation`` for convolutions, ``activation -> add`` for linear
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from tilewright.convert.graph.memory import is_kept
from tilewright.convert.graph.patterns import Activation, Modules, activation_of, addends, is_identity
from tilewright.kernels.activation import CONV_ACTIVATIONS
from tilewright.nn import FoldedBatchNorm

Part = Literal["norm", "residual", "activation"]
#: (user, end) -> what ``user`` does to ``end``, the end of the chain so far; None if it is no such part.
Match = Callable[[fx.Node, fx.Node], Any]


@dataclass(frozen=True)
class Chain:
    """nodes: from the first to the last, each the only reader of the one before. words: what was taken, in order.

    norm: the node. residual: what is added. activation: ("none", 0.01) if there is none.
    """

    nodes: tuple[fx.Node, ...]
    words: tuple[str, ...]
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    activation: Activation = ("none", 0.01)

    @property
    def end(self) -> fx.Node:
        """The node whose value the chain has."""
        return self.nodes[-1]

    def replace(self, new: fx.Node) -> None:
        """Let ``new`` stand for the whole chain, which is erased."""
        self.end.replace_all_uses_with(new)
        for node in reversed(self.nodes):
            node.graph.erase_node(node)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def follow(
    start: fx.Node,
    parts: Mapping[Part, Match],
    modules: Modules | None,
    may_move: Callable[[fx.Node, Sequence[fx.Node]], bool] = lambda user, chain: True,
) -> Chain:
    """The chain that begins at ``start``, as long as can be.

    parts: what may be taken, at most once each and in this order. modules: of the graph, by which it is seen what
    passes its input on unchanged; None: nothing is passed. may_move: whether a node that reads the chain so far may be
    computed where ``start`` is, or the chain ends before it.
    """
    nodes: list[fx.Node] = [start]
    words: list[str] = []
    taken: dict[Part, Any] = {}
    left = list(parts.items())
    while (user := only_reader(nodes[-1])) is not None and not is_kept(user):
        end = nodes[-1]
        if modules is not None and is_identity(user, modules) and user.args[0] is end:
            if not may_move(user, nodes):
                break
            if isinstance(modules.get(str(user.target)), FoldedBatchNorm):
                words.append("batch-norm")
        else:
            matches = ((i, match(user, end)) for i, (_, match) in enumerate(left))
            found = next((each for each in matches if each[1] is not None), None)
            if found is None or not may_move(user, nodes):
                break
            part, value = left[found[0]][0], found[1]
            taken[part], left = value, left[found[0] + 1 :]
            words.append(value[0] if part == "activation" else _WORDS[part])
        nodes.append(user)
    return Chain(tuple(nodes), tuple(words), **taken)


_WORDS: dict[Part, str] = {"norm": "batch-norm", "residual": "add"}


def added_to(user: fx.Node, end: fx.Node) -> fx.Node | None:
    """What ``user`` adds to ``end``; None if it adds nothing, or ``end`` itself."""
    pair = addends(user)
    if pair is None or pair[0] is pair[1]:
        return None
    return pair[1] if pair[0] is end else pair[0]


def activates(modules: Modules, known: Container[str] = CONV_ACTIVATIONS) -> Match:
    """Matches an activation that is one of ``known``."""

    def match(user: fx.Node, end: fx.Node) -> Activation | None:
        found = activation_of(user, modules)
        return found if found is not None and found[0] in known and user.args[0] is end else None

    return match
