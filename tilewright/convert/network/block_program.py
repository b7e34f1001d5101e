"""The program of a transformer's block, or of the stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from tilewright.convert.graph import HeldCache, Region, Untraceable, attention_output, call_forward, update_cache
from tilewright.convert.network import proof
from tilewright.convert.network.program import Program
from tilewright.convert.state import private_copy
from tilewright.kernels.cpu.replay import Replays
from tilewright.kernels.dispatch.same import SameTensors
from tilewright.nn.conv_int8 import scales_read


class BlockProgram(Program):
    """One for each way of calling. Sentences have many lengths: where the code asks about a length, the graph asks
    again, so one proof is enough for all of them but 1, which broadcasts.

    given: the inputs of a call: tensors, tuples of tensors, and one ``HeldCache`` at most.
    """

    most_replays = 64
    runs_around_hooks = False

    def __init__(self, region: Region, given: Sequence[Any]):
        super().__init__(region)
        #: Layers of the cache that it updates.
        self.cached = _layers_updated(region.graph)
        #: Of each input: how many tensors a tuple has, 0 for a tensor, -1 for a cache.
        self.structure = [len(x) if isinstance(x, tuple) else -isinstance(x, HeldCache) for x in given]
        #: Numbers of inputs, those in tuples counted one by one, that nothing but the attention to a cache reads.
        self.free = _read_by_attention_alone(region.graph, given) if self.cached else frozenset()

    @staticmethod
    def _kind_of(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return tuple(size == 1 for size in x.shape), x.dtype
        return tuple(map(BlockProgram._kind_of, x)) if isinstance(x, tuple) else type(x)

    def run(self, given: tuple[Any, ...]) -> Any:
        """What the owner's class computes in eval mode of the graph's inputs."""
        for x in given:
            if isinstance(x, HeldCache):
                x.layers = self.cached
        return super().run(given)

    def _by_layers(self, given: tuple[Any, ...], owner: nn.Module | None = None) -> Any:
        plain = tuple(x.cache if isinstance(x, HeldCache) else x for x in given)
        return call_forward(self.owner if owner is None else owner, self.inputs, plain, self.constants)

    # ---- the fast form
    def _bind_replays(self, owner: nn.Module, called: set[nn.Module]) -> None:
        super()._bind_replays(owner, called)
        if self._replays is not None:
            self._replays = Replays(self._run_leaves, scales_read, self._held_tensors, self.most_replays, self.free)

    def _fast(self, *given: Any) -> Any:
        replays = None if torch.is_grad_enabled() or proof.is_rehearsal() else self._replays
        if replays is None or any(self._watched):
            return self._run(*given)
        leaves: list[torch.Tensor] = []
        holder = None
        for x in given:
            if isinstance(x, torch.Tensor):
                leaves.append(x)
            elif isinstance(x, tuple):
                leaves += x
            else:
                holder = x
        return replays.run(tuple(leaves), holder)

    def _run_leaves(self, *leaves: Any) -> Any:
        """leaves: the tensors of all inputs, and at last the cache, if there is one."""
        given: list[Any] = []
        at = 0
        for size in self.structure:
            if size < 0:
                given.append(leaves[-1])
            elif size:
                given.append(leaves[at : at + size])
                at += size
            else:
                given.append(leaves[at])
                at += 1
        return self._run(*given)

    # ---- the proof
    def _prove(self, kinds: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
        """With a cache, which is not to be written to twice, what runs first is proven on copies."""
        if not self.cached:
            return super()._prove(kinds, given)
        held = SameTensors(self._held_tensors())
        found = proof.outcome(lambda inputs: self._flat(self._bound, *inputs), private_copy(given))
        reason = self._why_wrong(found, given)
        if reason is not None and held.match(self._held_tensors()):
            self._refuse(reason)
            return self._by_layers(given)
        if reason is not None:  # another thread has written weights meanwhile: what was compared is of different ones
            self._proven.pop(kinds, None)
        return self._flat(self._bound, *given)


def _layers_updated(graph: fx.Graph) -> tuple[int, ...]:
    layers = [node.args[3] for node in graph.nodes if node.target is update_cache]
    if not all(type(layer) is int for layer in layers):
        raise Untraceable("", "forward updates a layer of its cache that it computes")
    return tuple(dict.fromkeys(layers))


def _read_by_attention_alone(graph: fx.Graph, given: Sequence[Any]) -> frozenset[int]:
    updates = [node for node in graph.nodes if node.target is update_cache]
    held = {user for node in updates for user in node.users}
    found: list[int] = []
    number = 0
    for node, x in zip((node for node in graph.nodes if node.op == "placeholder"), given, strict=True):
        readers = [user for user in node.users if user.target is not None]
        attends = [user.target is attention_output and not held.isdisjoint(user.all_input_nodes) for user in readers]
        if isinstance(x, torch.Tensor) and readers and all(attends):
            found.append(number)
        number += len(x) if isinstance(x, tuple) else isinstance(x, torch.Tensor)
    return frozenset(found)
