"""Writes into memory, in a graph whose order is that of the code.

``settle`` lets whatever reads a value after it was overwritten read the result of the overwriting, by which the graph
says in its edges what the code says by its order. The writes stay where they are. Where an edge cannot say it, because
a view of what is overwritten is read afterwards, or because it is state of a module, the graph is refused.

``Writes`` then tells whoever moves a node what must not be passed by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import fx, nn

from tilewright.convert.graph.effects import effect_of
from tilewright.convert.graph.values import Untraceable, expect, expect_tensor, is_shape

_INPUT = "input"
_KEPT = "kept"
#: What a value may share its memory with: nodes that made it, "input", or the name of what a module holds, after a dot.
Roots = frozenset[fx.Node | str]


def is_kept(node: fx.Node) -> bool:
    """Whether somebody outside of the graph may see what ``node`` writes, so that it must be done and nothing else."""
    return bool(node.meta.get(_KEPT))


def settle(graph: fx.Graph, modules: Mapping[str, nn.Module], inputs_overlap: bool = True) -> None:
    """See above. modules: by the names that the graph uses. inputs_overlap: whether two inputs may share memory.

    Raises Untraceable.
    """
    _Settling(graph, modules, inputs_overlap).run()


class _Settling:
    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module], inputs_overlap: bool):
        self.graph, self.modules, self.inputs_overlap = graph, modules, inputs_overlap
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.roots: dict[fx.Node, Roots] = {}
        #: The first of the nodes that give this very tensor, with the values it has now.
        self.name: dict[fx.Node, fx.Node] = {}
        #: Roots that somebody outside of the graph may hold.
        self.outside: set[fx.Node | str] = {_INPUT}
        self.members: dict[fx.Node | str, list[fx.Node]] = {}
        self.refused: dict[str, str] = {}

    def run(self) -> None:
        done = False  # whether something was done that must not be done twice
        for node in list(self.graph.nodes):
            effect = effect_of(node, self.modules)
            if done and node.target in (expect, expect_tensor):
                self._refuse(
                    node, "forward asks for a shape after it has called what cannot be read, or written to its input"
                )
            self.name[node] = node if effect.same is None else self.name[effect.same]
            self.roots[node] = roots_of(node, effect.shares, self.roots)
            if node.op == "placeholder" and not self.inputs_overlap:
                self.roots[node] = frozenset((node,))
                self.outside.add(node)
            for root in self.roots[node]:
                self.members.setdefault(root, []).append(node)
            for target in effect.writes:
                done |= self._write(node, target, effect.same is target)
            if effect.once:
                node.meta[_KEPT] = done = True
            if effect.unknown and node.op != "output":
                self.outside.update(*(self.roots[each] for each in node.all_input_nodes), self.roots[node])
                done = True
        if self.refused:
            path = "" if "" in self.refused else next(iter(self.refused))
            reason = self.refused[path]
            raise Untraceable(path, reason, frozenset(self.refused))

    def _refuse(self, node: fx.Node, reason: str) -> None:
        self.refused.setdefault(str(node.meta.get("path", "")), reason)

    def _write(self, node: fx.Node, target: fx.Node, returned: bool) -> bool:
        """``node`` writes over ``target``. Returns whether somebody outside may see it."""
        roots = self.roots[target]
        held = [root for root in roots if isinstance(root, str) and root != _INPUT]
        if held:
            self._refuse(node, f"forward writes to {held[0].removeprefix('.')!r}, which the module holds")
            return True
        for other in {each: None for root in roots for each in self.members[root]}:
            later = [user for user in other.users if self.position[user] > self.position[node] and not is_shape(user)]
            if other is node or not later:
                continue
            if self.name[other] is not self.name[target] or not returned:
                self._refuse(node, "forward writes over a value of which a view, or another name, is read afterwards")
                return True
            for user in later:
                user.replace_input_with(other, node)
        self.name[node] = node
        seen = bool(roots & self.outside)
        if seen:
            node.meta[_KEPT] = True
        return seen


def roots_of(node: fx.Node, shares: Iterable[fx.Node], known: Mapping[fx.Node, Roots]) -> Roots:
    """What ``node`` may share its memory with."""
    if node.op == "placeholder":
        return frozenset((_INPUT,))
    if node.op == "get_attr":
        return frozenset((f".{node.target}",))
    return frozenset((node,)).union(*(known[each] for each in shares))


class Writes:
    """The writes of a settled graph. Nodes that come later are told of by ``add``."""

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]):
        self._roots: dict[fx.Node, Roots] = {}
        self._position: dict[fx.Node, int] = {}
        self._writers: list[tuple[fx.Node, Roots]] = []
        for i, node in enumerate(graph.nodes):
            effect = effect_of(node, modules)
            self._position[node] = i
            self._roots[node] = roots_of(node, effect.shares, self._roots)
            written = node.all_input_nodes if effect.unknown else effect.writes
            if written:
                self._writers.append((node, frozenset().union(*(self._roots[each] for each in written))))

    def add(self, new: fx.Node, like: fx.Node, at: fx.Node) -> None:
        """``new`` gives what ``like`` gave, and stands where ``at`` stood."""
        self._roots[new], self._position[new] = self._roots[like], self._position[at]

    def other_name_read_after(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether something that may share memory with ``value`` is read after ``node``, by another name."""
        others = [other for other, roots in self._roots.items() if roots & self._roots[value] and other is not value]
        return any(self._position.get(user, -1) > self._position[node] for other in others for user in other.users)

    def makers(self, value: fx.Node) -> list[fx.Node]:
        """The nodes that made the memory which ``value`` may share."""
        return [root for root in self._roots[value] if isinstance(root, fx.Node) and self._roots[root] == {root}]

    def stands_before(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether ``a`` comes before ``b``."""
        return self._position[a] < self._position[b]

    def between(self, start: fx.Node, end: fx.Node, values: Iterable[fx.Node], but: Collection[fx.Node]) -> bool:
        """Whether something after ``start`` and before ``end``, not in ``but``, may write to one of ``values``."""
        first, last = self._position[start], self._position[end]
        read: Roots = frozenset().union(*(self._roots.get(value, frozenset()) for value in values))
        return any(
            first < self._position[node] < last and node not in but and bool(written & read)
            for node, written in self._writers
        )
