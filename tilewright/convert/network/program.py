"""The ``forward`` that a converted model runs: the traced graph with its convolutions fused.

A program stands in the instance's ``forward`` and the class stays what it was. Every submodule keeps a meaning of its
own (a convolution with batch-norm folded in, a batch-norm that passes its input on), so the ``forward`` of the class
computes the same, with more kernels. The program falls back to it wherever the graph would not be what the caller asks
for: in training mode, with other arguments than the graph was made for, with hooks or submodules that came later.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tilewright.convert.graph import (
    NotAsExpected,
    Region,
    bind_call,
    call_forward,
    compiled,
    flattened,
    is_kept,
    is_known,
    source_of,
)
from tilewright.convert.network import proof
from tilewright.convert.network import replayable as whole
from tilewright.convert.network.around_hooks import Surroundings
from tilewright.convert.network.assumed import assumptions, place_of
from tilewright.convert.network.draws import Draws, Unrepeatable
from tilewright.convert.network.int8_writing import before_integers
from tilewright.convert.state import HeldState, private_copy, private_twin
from tilewright.convert.structure import ReplacedForward
from tilewright.kernels.cpu.replay import MOST_REPLAYS, Replays
from tilewright.kernels.dispatch import regions
from tilewright.kernels.dispatch.derivatives import detached, is_differentiated, is_transformed, joined, without_graph
from tilewright.kernels.dispatch.same import SameTensors
from tilewright.nn import FoldedBatchNorm
from tilewright.nn.conv_int8 import scales_read

logger = logging.getLogger("tilewright")
#: Kinds of inputs of which a program remembers that it is proven.
MOST_PROVEN = 4096
#: Tables of the hooks of one module, and of hooks on every module there is.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_ON_ALL = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
#: What is kept in copies and pickles.
_KEPT = (
    "owner",
    "inputs",
    "defaults",
    "constants",
    "gradients",
    "source",
    "flat_source",
    "leaves",
    "called",
    "whole",
    "assumed",
    "refused",
    "writes_outside",
    "before",
)


class Program(ReplacedForward):
    """A callable in place of ``owner.forward``.

    source, names: Python code of ``def forward(self, ...)`` and the globals it uses. flat_source: the same with
    ``leaf_i`` in place of dotted names. leaves: these names. called: leaves that the code calls as modules. inputs,
    defaults, gradients: as of ``Region``. steps: code of the same graph in other forms, if what int8 layers hand on is
    int8: with floats handed on, and with those rounded as int8 rounds them.

    What the program computes is compared with what the layers compute by the ``forward`` of the class, on the first
    call with inputs of a shape (``proof``).
    """

    writes_outside = False  # of those that were pickled before there was such a thing
    constants: Mapping[str, Any] = MappingProxyType({})  # likewise
    most_replays = MOST_REPLAYS
    #: Whether what lies around watched modules is recorded.
    runs_around_hooks = True

    def __init__(self, region: Region, steps: Sequence[fx.Graph] = ()):
        self.owner, self.inputs, self.defaults = region.module, region.inputs, region.defaults
        self.gradients, self.constants = region.gradients, region.constants
        self.source, self.names = source_of(region.graph)
        modules = region.modules()
        flat, self.leaves, self.called = flattened(region.graph, modules)
        #: Whether a compiled graph calls it as one operator.
        self.whole = whole.runs_whole(region.graph, modules)
        self.flat_source, _ = source_of(flat)
        self.steps = [source_of(graph) for graph in steps]
        #: Whether it writes to its inputs, or to what somebody else may hold: after an error nobody knows how much.
        self.writes_outside = any(map(is_kept, region.graph.nodes))
        #: Modules that something is computed with before int8 is handed on.
        self.before = before_integers(steps[1], modules) if steps else []
        self.assumed = assumptions(self.owner, [self.leaves[leaf] for leaf in self.called])
        #: Runs instead of the program while activations are observed: inputs -> outputs.
        self.observer: Callable[..., Any] | None = None
        self._make()

    def _make(self) -> None:
        self._function = compiled(self.source, self.names)
        self._flat = compiled(self.flat_source, self.names)
        if self.steps:
            self._smooth = compiled(*self.steps[1])
        #: Kinds of inputs, the oldest first.
        self._proven: dict[Any, None] = {}
        #: What the fast form refers to, as attributes.
        self._bound: types.SimpleNamespace | None = None
        self._replays: Replays | None = None
        self._region = regions.OpaqueRegion(weakref.WeakMethod(self._eager), weakref.WeakMethod(self._traced))
        self._region_name = regions.add(self._region)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name in _KEPT}
        state["steps"] = [(source, *_picklable(names)) for source, names in self.steps]
        state["names"], state["imports"] = _picklable(self.names)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.names = _unpickled(self.names, vars(self).pop("imports"))
        self.steps = [(source, _unpickled(names, imports)) for source, names, imports in state["steps"]]
        self.observer = None
        self._make()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the owner's class computes."""
        owner = self.owner
        given = args if len(args) == len(self.inputs) and not kwargs else self._inputs_of(args, kwargs)
        if given is None or owner.training or self.refused is not None:
            return type(owner).forward(owner, *args, **kwargs)
        return self.run(given)

    def run(self, given: tuple[Any, ...]) -> Any:
        """What the owner's class computes in eval mode of the graph's inputs."""
        owner = self.owner
        if not self.gradients and torch.is_grad_enabled():
            with torch.no_grad():
                return self.run(given)
        if torch.compiler.is_compiling():
            if self._loses_derivatives(given):
                return self._straight_through(functools.partial(self._function, owner), given)
            if self.whole and whole.supports(given):
                return torch.ops.tilewright.region(list(given), self._region_name)
            return self._function(owner, *given)
        try:
            if self.observer is not None:
                return self.observer(given)
            if not self._is_current():
                return self._by_layers(given)
            watched = self._while_watched(given)
            if watched is None and self._loses_derivatives(given):
                return self._straight_through(self._fast, given)
            if watched is None:
                return self._fast(*given)
        except NotAsExpected:
            return self._by_layers(given)
        except Exception as error:
            return self._after(error, given)
        return watched(given)  # whatever a hook raises is its own affair

    def _after(self, error: Exception, given: tuple[Any, ...]) -> Any:
        """Raise what the layers raise for inputs that the graph does not take: they name themselves. For a single image
        raise what the batch-norm did that is folded now. Where the layers take the inputs it is the end of the program.
        """
        norms = (part for part in self.owner.modules() if isinstance(part, FoldedBatchNorm))
        if any(norm.images for norm in norms) and isinstance(given[0], torch.Tensor) and given[0].dim() == 3:
            raise ValueError("expected 4D input (got 3D input): a batch of images [N, C, H, W]") from error
        try:
            result = self._by_layers(private_copy(given))
        except Exception as theirs:
            raise theirs from error
        scarce = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if scarce or self.writes_outside or self.observer is not None or not proof.may_run(given):
            raise error
        self._refuse(f"it raises {type(error).__name__}: {error}")
        return result

    def _refuse(self, reason: str) -> None:
        self.refused = f"its graph does not compute what its layers do: {reason}"
        logger.warning("%s runs layer by layer from now on: %s", type(self.owner).__name__, self.refused)

    def _by_layers(self, given: tuple[Any, ...], owner: nn.Module | None = None) -> Any:
        return call_forward(self.owner if owner is None else owner, self.inputs, given, self.constants)

    def _eager(self, *given: Any) -> Any:
        """What a compiled graph calls: as from Python, on the graph's inputs."""
        return self(*given) if len(given) == 1 else self(**dict(zip(self.inputs, given, strict=True)))

    def _traced(self, *given: Any) -> Any:
        """The same operator by operator, for tensors that stand for others."""
        try:
            return self._function(self.owner, *given)
        except NotAsExpected:
            return self._by_layers(given)

    def _while_watched(self, given: tuple[Any, ...]) -> Callable[..., Any] | None:
        """What runs, on the inputs, while hooks watch modules whose calls the program does not make, or a recording
        would pass by; None where the program may run.
        """
        inside = any(self._hooks)
        if not inside and (self._replays is None or not any(self._watched)):
            return None
        around = None
        if self._replays is not None and self.runs_around_hooks and not (self.writes_outside or any(_HOOKS_ON_ALL)):
            tables = [*self._hooks, *self._watched]
            hooks = tuple((number, *table) for number, table in enumerate(tables) if table)
            around = self._around.find(hooks, given)
        return self._by_layers if around is None and inside else around

    def _fast(self, *given: Any) -> Any:
        # A recording misses hooks on what it calls, and begins with a call that is proven on its whole batch.
        replays = None if torch.is_grad_enabled() or proof.is_rehearsal() else self._replays
        if replays is not None and not any(self._watched):
            return replays(*given)
        return self._run(*given)

    # ---- derivatives
    def _loses_derivatives(self, given: tuple[Any, ...]) -> bool:
        """Whether somebody may ask for a derivative that ends where int8 is handed on."""
        if not self.steps or not (torch.is_grad_enabled() or is_transformed()):
            return False
        trained = [each for name in self.before for each in self.owner.get_submodule(name).parameters()]
        return is_differentiated(*given, *trained)

    def _straight_through(self, run: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """What ``run`` computes, with derivatives that pass the rounding: those of the steps that hand floats on."""
        own = pytree.tree_map_only(torch.Tensor, torch.clone, detached(given))  # either may write to its inputs
        return joined(without_graph(run, *own), self._smooth(self.owner, *given))

    def _inputs_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What a call gives the graph's inputs; None if it asks for something else than the graph does."""
        found = bind_call(type(self.owner), self.inputs, self.defaults, args, kwargs)
        return None if isinstance(found, str) else found

    # ---- the fast form
    def _is_current(self) -> bool:
        """Whether the model is still the one that was converted: no submodule replaced, no attribute changed that the
        code names.
        """
        if self._bound is None:
            self._bind()
        return list(map(dict.get, self._tables, self._keys)) == self._expected

    def _bind(self) -> None:
        """Look up the submodules once: ``nn.Module`` is slow to reach them, and there are many."""
        owner, bound = self.owner, types.SimpleNamespace()
        for leaf, path in self.leaves.items():
            setattr(bound, leaf, owner.get_submodule(path))
        called = {getattr(bound, leaf) for leaf in self.called}
        inside_called = {part for module in called for part in module.modules()}
        inlined = [module for module in owner.modules() if module not in inside_called]
        places = [(module._modules, name) for module in inlined for name in module._modules]
        self._tables, self._keys = [table for table, _ in places], [name for _, name in places]
        self._expected = [table[name] for table, name in places]
        self._tables += [place_of(owner, each) for each in self.assumed]
        self._keys += [each.name for each in self.assumed]
        self._expected += [each.value for each in self.assumed]
        hooked = [module for module in inlined if module is not owner]
        self._hooks = [vars(module)[name] for module in hooked for name in _HOOKS] + _HOOKS_ON_ALL
        self._bind_replays(owner, called)
        self._bound = bound  # last: from now on other threads use what was set before

    def _bind_replays(self, owner: nn.Module, called: set[nn.Module]) -> None:
        """On a CPU a recording of the program is faster, if it does the same operators in each call.

        Code that was not traced may branch on values; a model with such parts is not recorded.
        """
        if not all(is_known(module) for module in called):
            return
        parts = [part for module in called for part in module.modules()]
        self._watched = [table for part in parts for table in (part._forward_hooks, part._forward_pre_hooks)]
        held = [(t, n) for m in owner.modules() for t in (m._parameters, m._buffers) for n in t]
        self._tensor_tables, self._tensor_names = [table for table, _ in held], [name for _, name in held]
        self._replays = Replays(self._run, scales_read, self._held_tensors, self.most_replays)
        self._around = Surroundings(owner, self.inputs, self._held_tensors, self.most_replays)

    # ---- the proof
    def _run(self, *given: Any) -> Any:
        """The fast form; proven, if it has not run on such inputs yet."""
        kinds = tuple(map(self._kind_of, given))
        if kinds in self._proven or self._replays is None or any(self._watched) or not proof.may_run(given):
            return self._flat(self._bound, *given)
        if len(self._proven) >= MOST_PROVEN:
            with contextlib.suppress(StopIteration, KeyError, RuntimeError):  # another thread does the same
                del self._proven[next(iter(self._proven))]
        self._proven[kinds] = None
        return self._prove(kinds, given)

    @staticmethod
    def _kind_of(x: Any) -> Any:
        """Inputs for which a proof is as good as for others of the same kind."""
        return (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else type(x)

    def _prove(self, kinds: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
        """The result for ``given``, and the end of the program if it is not what the layers give."""
        before, held = private_copy(given), SameTensors(self._held_tensors())
        result = self._flat(self._bound, *given)
        some = proof.first_samples(before) if proof.is_rehearsal() else None
        if some is not None and self._why_wrong(None, some) is None:
            self._proven.pop(kinds, None)  # the user's first call looks at all of its batch
            return result
        reason = self._why_wrong((result, given), before)
        if reason is None and proof.is_rehearsal():
            self._proven.pop(kinds, None)  # these may be some of its samples
        if reason is None:
            return result
        if not held.match(self._held_tensors()):  # by another thread: what was compared is of different weights
            self._proven.pop(kinds, None)
            return result
        self._refuse(reason)
        with torch.no_grad():
            for x, values in zip(pytree.tree_leaves(given), pytree.tree_leaves(before), strict=True):
                if isinstance(x, torch.Tensor) and not torch.equal(x, values):
                    x.copy_(values)
        return self._by_layers(given)

    def _why_wrong(self, found: Any, given: tuple[Any, ...]) -> str | None:
        """Why the program differs from the layers on ``given``. found: its ``outcome``, if it is known already."""
        twin = private_twin(self.owner)
        owner = self.owner if twin is None else twin
        state, drew = HeldState(owner), False

        def run(function: proof.Run, inputs: tuple[Any, ...]) -> Any:
            nonlocal drew
            with torch.no_grad(), Draws() as draws:
                result = function(inputs)
            drew |= draws.any
            return result

        def outcome(function: proof.Run) -> Any:
            return proof.outcome(functools.partial(run, function), private_copy(given))

        def compare(function: proof.Run, found: Callable[[], Any]) -> str | None:
            expected = outcome(function)
            return proof.why_differs(found(), expected, functools.partial(run, function), given)

        def answer() -> Any:
            again = drew or found is None
            return outcome(lambda inputs: self._flat(self._bound, *inputs)) if again else found

        def step(number: int) -> proof.Run:
            function = compiled(*self.steps[number])
            return lambda inputs: function(owner, *inputs)

        by_layers = functools.partial(self._by_layers, owner=owner)
        try:
            if not self.steps:
                reason = compare(by_layers, answer)
            else:
                reason = compare(by_layers, functools.partial(outcome, step(0))) or compare(step(1), answer)
        except Unrepeatable:
            reason = None
        except Exception as error:
            reason = f"they raise {type(error).__name__}"
        if state.changed():
            if twin is None:
                state.restore()
            reason = "forward writes state that the graph does not know of"
        return reason

    def _held_tensors(self) -> list[torch.Tensor | None]:
        return list(map(dict.get, self._tensor_tables, self._tensor_names))  # type: ignore[arg-type]


class Watched(Program):
    """Stands where the program of ``region`` will while its values are observed. It has no code: the graph of
    the region is interpreted, or layers run.
    """

    def __init__(self, region: Region):
        self.owner, self.inputs, self.defaults = region.module, region.inputs, region.defaults
        self.gradients, self.constants = region.gradients, region.constants
        self.observer: Callable[..., Any] | None = None

    def run(self, given: tuple[Any, ...]) -> Any:
        """As of ``Program``."""
        if self.observer is None:
            return self._by_layers(given)
        try:
            return self.observer(given)
        except NotAsExpected:
            return self._by_layers(given)
        except Exception as error:
            return self._after(error, given)


def _picklable(names: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Globals of a function without modules of Python, which cannot be pickled, and those modules' names."""
    modules = {name: value.__name__ for name, value in names.items() if isinstance(value, types.ModuleType)}
    return {name: value for name, value in names.items() if name not in modules}, modules


def _unpickled(names: dict[str, Any], modules: dict[str, str]) -> dict[str, Any]:
    return names | {name: importlib.import_module(module) for name, module in modules.items()}


def remove_programs(model: nn.Module) -> None:
    """Let every module run its class's ``forward`` again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Program):
            del vars(module)["forward"]
