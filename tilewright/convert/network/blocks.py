"""The ``forward`` of a transformer's blocks, and of the stack of them: one program where it can be.

A block is what a list of modules holds, with attention by our kernel and quantised layers inside whose products are
steps (``replay_rows``); the module around the list, such as the encoder of a BERT, is its stack. What a program
computes depends on how it is called: with a mask or without, in how many dimensions. So the code is read when it is
first called in some way (``trace_call``), and the graph becomes a ``Program``, which is proven against the layers and
replayed. A stack that cannot be read runs by its class, and its blocks have programs of their own; so it is with a
stack in which a hook listens to one block.

A decoder's block is given a cache of keys and values: an object that grows and is the user's. Its ``update`` and the
attention to what it gives are called from Python; what lies before and behind them is a C call each, whatever the
length of what the cache holds (``block_program``).

A program answers to the bit what the layers do: its steps are the C kernels that serve them, in the order in which they
add. ``TILEWRIGHT_TRANSFORMER_PROGRAMS=0``, when a model is converted or loaded, leaves programs out.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tilewright.convert.graph import (
    AttentionConfig,
    ExampleCache,
    HeldCache,
    Untraceable,
    describe,
    is_cache,
    trace_call,
)
from tilewright.convert.network.block_program import BlockProgram
from tilewright.convert.network.program import Program
from tilewright.convert.record import join
from tilewright.convert.structure import ReplacedForward
from tilewright.kernels.cpu import steps
from tilewright.kernels.cpu.replay import is_special
from tilewright.kernels.cpu.replay_rows import ROWS
from tilewright.kernels.dispatch import router
from tilewright.nn import QuantizedLinear

#: The variable that leaves programs out.
VARIABLE = "TILEWRIGHT_TRANSFORMER_PROGRAMS"
#: Ways of calling one block that are told apart.
MOST_WAYS = 16
#: Elements of an input up to which a stack is one program: while it is read and recorded, all that its layers make is
#: kept, and beyond, what Python costs between two layers is little.
MOST_ELEMENTS = 1 << 19
_CONSTANTS = (type(None), bool, int, float, str)


class Block(ReplacedForward):
    """A callable in place of ``owner.forward``. stack: whether the owner holds the list of blocks."""

    def __init__(self, owner: nn.Module):
        self.owner = owner
        self.stack = any(isinstance(child, nn.ModuleList) for child in owner.children())
        self._make()

    def _make(self) -> None:
        #: By the way of calling: the program, or why there is none, in words.
        self.programs: dict[Any, Program | str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "stack": self.stack}  # a copy reads its own code

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.owner, self.stack = state["owner"], state["stack"]
        self._make()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the owner's class computes."""
        owner = self.owner
        if torch.compiler.is_compiling():
            return type(owner).forward(owner, *args, **kwargs)
        if owner.training or torch.is_grad_enabled() or is_special() or router.records_problems():
            return type(owner).forward(owner, *args, **kwargs)
        way, inputs, others = _way(type(owner), args, kwargs)
        if way is not None and (self.stack or way[0]) and _most_elements(inputs.values()) > MOST_ELEMENTS:
            way = None
        program = None if way is None else self.programs.get(way)
        if program is None and way is not None:
            program = self._read(way, inputs, others)
        if isinstance(program, Program) and program.refused is None:
            return program.run(tuple(inputs.values()))
        result = type(owner).forward(owner, *args, **kwargs)
        if isinstance(program, str) and way is not None:  # after the call: what the layers refuse says nothing
            self.programs.setdefault(way, program)
        return result

    def _read(self, way: Any, inputs: Mapping[str, Any], others: dict[str, Any]) -> Program | str | None:
        """The program for calls of this kind, or why there is none; None while another thread reads the code."""
        if reason := steps.why_no_kernels():
            return reason
        if any(x.device.type != "cpu" for x in _tensors(inputs.values())):
            return "its inputs are on another device"
        if len(self.programs) >= MOST_WAYS:
            return None
        if not self._lock.acquire(blocking=False):
            return None
        try:
            examples = {name: ExampleCache(x.cache) if isinstance(x, HeldCache) else x for name, x in inputs.items()}
            program = BlockProgram(trace_call(self.owner, examples, others), tuple(inputs.values()))
        except Untraceable as error:
            where = type(self.owner).__name__ if not error.path else error.path
            return f"{where}: {error.reason}"
        except Exception as error:  # the layers decide whether it is one of the caller's
            return describe(error)
        finally:
            self._lock.release()
        self.programs[way] = program
        return program

    @property
    def state(self) -> str:
        """In words, how it runs."""
        programs = [each for each in list(self.programs.values()) if isinstance(each, Program) and not each.refused]
        reasons = [each if isinstance(each, str) else each.refused for each in list(self.programs.values())]
        replayed = [replay for each in programs if each._replays is not None for replay in each._replays.replays]
        if replayed:
            calls = replayed[-1].c_calls
            return f"one program: {replayed[-1].native_steps} operators in {calls} C call{'s' * (calls > 1)}"
        not_replayed = [each._replays.why_not for each in programs if each._replays is not None]
        if found := [each for each in (*not_replayed, *reasons) if each]:
            return f"layer by layer: {found[-1]}"
        return "one program, from the third call on" if programs else "not called in inference yet"


@functools.lru_cache(maxsize=1024)
def _parameter_names(kind: Any) -> tuple[str, ...] | None:
    """Of ``forward``; None where it takes any number of arguments."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters):
        return None
    return tuple(each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD)


def _way(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """How a module of the class ``kind`` is called, fit for a key, which begins with whether there is a cache; the
    tensors among its arguments, tuples of tensors and the cache; and the others. The first is None where one is none of
    these and no constant.
    """
    names = _parameter_names(kind)
    if names is None or len(args) > len(names):
        return None, {}, {}
    given = dict(zip(names, args, strict=False)) | kwargs if args else kwargs
    inputs: dict[str, Any] = {}
    others: dict[str, Any] = {}
    looks: list[Any] = [False]
    for name, value in given.items():
        if type(value) is torch.Tensor:
            inputs[name] = value
            looks.append((name, value.dim(), value.dtype))
        elif type(value) in _CONSTANTS:
            others[name] = value
            looks.append((name, value))
        elif type(value) is tuple and value and all(type(x) is torch.Tensor for x in value):
            inputs[name] = value
            looks.append((name, *[(x.dim(), x.dtype) for x in value]))
        elif not looks[0] and is_cache(value):
            inputs[name] = HeldCache(value)
            looks[0] = True
            looks.append((name, type(value)))
        else:
            return None, {}, {}
    return (tuple(looks) if inputs else None), inputs, others


def _tensors(inputs: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in inputs:
        yield from x if isinstance(x, tuple) else () if isinstance(x, HeldCache) else (x,)


def _most_elements(inputs: Iterable[Any]) -> int:
    return max(x.numel() for x in _tensors(inputs))


def _is_block(module: nn.Module) -> bool:
    parts = list(module.modules())
    attends = any(type(vars(part).get("config")) is AttentionConfig for part in parts)
    return attends and any(
        isinstance(part, QuantizedLinear) and f"tilewright.{part.op_name}.default" in ROWS for part in parts
    )


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The stacks and blocks of ``model`` that may have programs."""
    for module in model.modules():
        for child in module.children():
            if not isinstance(child, nn.ModuleList):
                continue
            found = [part for part in child if _is_block(part)]
            yield from found
            # A whole model makes masks and positions, and decides whether there is a cache.
            if found and not hasattr(module, "get_input_embeddings"):
                yield module


def install_blocks(model: nn.Module) -> None:
    """Give the blocks of ``model`` and their stacks programs, in place of any that they have."""
    remove_blocks(model)
    if os.environ.get(VARIABLE) == "0":
        return
    for module in dict.fromkeys(blocks_of(model)):
        if "forward" not in vars(module):
            vars(module)["forward"] = Block(module)


def remove_blocks(model: nn.Module) -> None:
    """Let every block run its class's ``forward`` again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), Block):
            del vars(module)["forward"]


def states_of(model: nn.Module) -> dict[str, str]:
    """How the stacks and blocks of ``model`` run: name -> words. Blocks of a stack that is one program are left out."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        inside = any(
            state.startswith("one program") and name.startswith(join(outer, "")) for outer, state in found.items()
        )
        if isinstance(forward, Block) and not inside:
            found[name] = forward.state
    return found
