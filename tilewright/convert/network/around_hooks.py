"""What a program does while hooks watch modules inside of it: the modules that they watch are called, and what lies
between these calls is recorded, piece by piece.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from tilewright.convert.graph import (
    Untraceable,
    Writes,
    call_forward,
    compiled,
    effect_of,
    source_of,
    trace_with_opaque_parts,
)
from tilewright.convert.network import proof
from tilewright.convert.network.int8_writing import write_int8
from tilewright.convert.network.match import rewrite
from tilewright.convert.state import private_copy, private_twin
from tilewright.kernels.cpu.replay import Replays
from tilewright.nn.conv_int8 import scales_read

logger = logging.getLogger("tilewright")

#: So many calls go layer by layer before it is worth to read the code anew: somebody may look once.
_CALLS_BEFORE = 2
#: Sets of hooks of which it is remembered what came of them.
_MOST_SETS = 4
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TensorsOf = Callable[[], Sequence[torch.Tensor | None]]


@dataclass
class Piece:
    """Nodes that run one after the other. alone: whether they must be called from Python each time.

    reads: values of other pieces. makes: values that other pieces read, or the caller.
    """

    nodes: list[fx.Node]
    alone: bool
    reads: list[fx.Node] = field(default_factory=list)
    makes: list[fx.Node] = field(default_factory=list)

    def function(self) -> Callable[..., tuple[Any, ...]]:
        """(owner, *reads) -> makes."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.reads:
            copies[node] = graph.placeholder(node.name)

        def copy_of(node: fx.Node) -> fx.Node:
            if node not in copies:  # a constant
                copies[node] = graph.node_copy(node, copy_of)
            return copies[node]

        for node in self.nodes:
            copies[node] = graph.node_copy(node, copy_of)
        graph.output(tuple(copies[node] for node in self.makes))
        return compiled(*source_of(graph))


def cut(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Piece]:
    """The nodes of ``graph`` in pieces that may be recorded, and between them those that may not: calls of what cannot
    be read, and writes to what another piece has made.
    """
    pieces: list[Piece] = []
    writes = Writes(graph, modules)
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or _is_constant(node):
            continue
        here = set(pieces[-1].nodes) if pieces and not pieces[-1].alone else set()
        effect = effect_of(node, modules)
        if effect.unknown or not all(here.intersection(writes.makers(each)) for each in effect.writes):
            pieces.append(Piece([node], alone=True))
        elif here:
            pieces[-1].nodes.append(node)
        else:
            pieces.append(Piece([node], alone=False))
    for piece in pieces:
        own = set(piece.nodes)
        read = (_read(each) for node in piece.nodes for each in node.all_input_nodes)
        piece.reads = list(dict.fromkeys(each for found in read for each in found if each not in own))
        piece.makes = [node for node in piece.nodes if not own.issuperset(node.users)]
        # A recording gives each result memory of its own, and a hook may write to one of them.
        makers = [each for node in piece.makes for each in writes.makers(node)]
        piece.alone |= len(set(makers)) < len(makers)
    return pieces


def _is_constant(node: fx.Node) -> bool:
    """Whether it is a module, something that a module holds, or a number among these: every piece asks for its own."""
    return node.op == "get_attr" or (
        node.op == "call_function" and node.target is getattr and all(map(_is_constant, node.all_input_nodes))
    )


def _read(node: fx.Node) -> list[fx.Node]:
    return [] if _is_constant(node) else [node]


class AroundHooks:
    """The network of ``owner`` with the modules as they are watched now. Raises Untraceable.

    inputs: names of the arguments. tensors: all that the modules hold.
    """

    def __init__(self, owner: nn.Module, inputs: tuple[str, ...], tensors: _TensorsOf, most: int):
        self.owner, self.inputs = owner, inputs
        region = trace_with_opaque_parts("", owner)
        if region.inputs != inputs or region.constants or not region.gradients:
            raise Untraceable("", "it is called otherwise")
        modules, sites = region.modules(), rewrite(region)
        self.steps = [compiled(*source_of(graph)) for graph in write_int8(region.graph, modules, sites)]
        nodes = list(region.graph.nodes)
        self.given = [node for node in nodes if node.op == "placeholder"]
        self.result: Any = nodes[-1].args[0]
        self.pieces = cut(region.graph, modules)
        self.functions = [piece.function() for piece in self.pieces]
        last: dict[fx.Node, int] = {node: i for i, piece in enumerate(self.pieces) for node in piece.reads}
        kept = set(nodes[-1].all_input_nodes)
        #: By piece, the values that nobody reads after it.
        self.dead = [[n for n, at in last.items() if at == i and n not in kept] for i in range(len(self.pieces))]
        bound = [functools.partial(function, owner) for function in self.functions]
        self.recorded: list[Callable[..., tuple[Any, ...]]] = [
            each if piece.alone else Replays(each, scales_read, tensors, most)
            for piece, each in zip(self.pieces, bound, strict=True)
        ]

    def __call__(self, given: tuple[Any, ...]) -> Any:
        """What the owner's class computes, with the hooks that its modules have."""
        return self._run(self.recorded, given)

    def _run(self, functions: Sequence[Callable[..., tuple[Any, ...]]], given: tuple[Any, ...]) -> Any:
        values: dict[fx.Node, Any] = dict(zip(self.given, given, strict=True))
        for piece, function, dead in zip(self.pieces, functions, self.dead, strict=True):
            values.update(zip(piece.makes, function(*map(values.__getitem__, piece.reads)), strict=True))
            for node in dead:
                values.pop(node, None)
        return fx.map_arg(self.result, values.__getitem__)

    def why_wrong(self, given: tuple[Any, ...]) -> str | None:
        """Why it differs from the layers on ``given``, in words, or None. No hook hears of it."""
        twin = private_twin(self.owner)
        if twin is None:
            return "no copy of it can be made to compare with"
        for module in twin.modules():
            vars(module).update({name: type(held)() for name in _HOOKS if (held := vars(module).get(name))})
        bound = [functools.partial(function, twin) for function in self.functions]
        runs: list[proof.Run] = [lambda inputs: call_forward(twin, self.inputs, inputs)]
        for step in self.steps:
            runs.append(lambda inputs, step=step: step(twin, *inputs))  # type: ignore[misc]
        runs.append(lambda inputs: self._run(bound, inputs))
        with torch.no_grad():
            for theirs, ours in zip(runs[::2], runs[1::2], strict=True):
                expected, found = (proof.outcome(run, private_copy(given)) for run in (theirs, ours))
                if reason := proof.why_differs(found, expected, theirs, given):
                    return reason
        return None


class Surroundings:
    """What runs around each set of hooks that was seen. Arguments as of ``AroundHooks``."""

    def __init__(self, owner: nn.Module, inputs: tuple[str, ...], tensors: _TensorsOf, most: int):
        self._arguments = owner, inputs, tensors, most
        #: By set of hooks, how many calls there were, or what runs; None where the layers do. And the kinds of inputs
        #: for which that is proven.
        self._known: dict[Hashable, int | AroundHooks | None] = {}
        self._proven: set[Hashable] = set()
        self._lock = threading.Lock()

    def find(self, hooks: Hashable, given: tuple[Any, ...]) -> Callable[[tuple[Any, ...]], Any] | None:
        """What to call on ``given`` while there are these hooks; None: the layers."""
        found = self._known.get(hooks, 0)
        if found is None or torch.is_grad_enabled() or proof.is_rehearsal() or not proof.may_run(given):
            return None
        if not all(isinstance(x, torch.Tensor) for x in given) or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._made(hooks, found, given)
        finally:
            self._lock.release()

    def _made(self, hooks: Hashable, found: int | AroundHooks, given: tuple[Any, ...]) -> AroundHooks | None:
        if isinstance(found, int) and found < _CALLS_BEFORE:
            if hooks not in self._known and len(self._known) >= _MOST_SETS:
                self._known.clear()
                self._proven.clear()
            self._known[hooks] = found + 1
            return None
        kind = hooks, *((x.shape, x.stride(), x.dtype) for x in given)
        if not isinstance(found, int) and kind in self._proven:
            return found
        try:
            made = AroundHooks(*self._arguments) if isinstance(found, int) else found
            reason = made.why_wrong(given)
        except Exception as error:  # of the code that is read, or on inputs that the layers do not take either
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            logger.debug("%s runs layer by layer under its hooks: %s", type(self._arguments[0]).__name__, reason)
            self._known[hooks] = None
            return None
        self._known[hooks] = made
        self._proven.add(kind)
        return made
