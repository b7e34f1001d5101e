"""A converted model is called once before it is handed out, where there is something to call it on.

Why a layer must be left alone is asked of the layer. Whether the code around it can do with another class in its place
shows when that code runs: it may ask what class it is, or reach for what only that class has. A layer that raises then
is given back, one at a time, with its error as the reason. And code that multiplies with the weight of a layer misses
the activation that was fused into it, so where a weight is read the activation becomes a module again.
"""

from __future__ import annotations

import linecache
import re
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from tilewright.convert import calibrate, layers, structure
from tilewright.convert.conversion import Job
from tilewright.convert.graph import unfuse_activations
from tilewright.convert.network.blocks import Block
from tilewright.convert.network.convolutions import install_programs
from tilewright.convert.network.program import Program, remove_programs
from tilewright.convert.network.proof import first_samples, rehearsal
from tilewright.convert.progress import track
from tilewright.kernels.dispatch.layers import invalidate as invalidate_calls
from tilewright.kernels.dispatch.packed import invalidate as invalidate_packed
from tilewright.nn import ConvLayer, FoldedBatchNorm, QuantizedLinear
from tilewright.nn.float_weight import LinkedWeight
from tilewright.nn.stored_weight import noting_reads

#: How the reason begins for which a layer was given back.
RAISED = "the converted model could not be called with it"
ROUNDED = "; inplace=True had freed its weight, so it has the rounded one"


def give_back_what_raises(job: Job, original: nn.Module | None, inputs: Sequence[Any]) -> None:
    """Call the model on ``inputs``, in turn, until none raises.

    original: the model as it was, whose layers are given back; None: it is gone, and their weights are those that the
    converted layers stand for. Raises RuntimeError if no converted layer can be to blame.
    """
    read: list[Any] = []
    for item in track(inputs, "Trying", job.progress, job.rest):
        while (error := _raised(job.model, item, read)) is not None:
            name = _suspect(job, error)
            if name is None:
                raise RuntimeError(f"the converted model cannot be called: {_described(error)}") from error
            _give_back(job, name, original)
            del job.record.layers[name]
            why = f"{RAISED}: {_described(error)}"
            job.record.skipped[name] = why if original is not None else why + ROUNDED
    for name, made in job.record.layers.items():
        layer = job.model.get_submodule(name)
        if any(each is layer for each in read) and isinstance(layer, QuantizedLinear):
            made.label = made.label.removesuffix(f" + {layer.activation}")
            unfuse_activations(job.model, only=layer)
    _forget(job.model)


def _raised(model: nn.Module, item: Any, read: list[Any]) -> Exception | None:
    """What a call raises. read: layers whose weights it asks for are added.

    Where programs run in the model two samples of a batch do, as in a proof, unless they are what it raises for.
    """
    some = _first_samples(model, item)
    for inputs in [item] if some is None else [some, item]:
        try:
            with calibrate.evaluation(model), noting_reads() as owners, rehearsal():
                calibrate.call(model, inputs)
            read += owners
        except Exception as error:  # whatever the model's code raises
            found = error
        else:
            return None
    return found


def _first_samples(model: nn.Module, item: Any) -> Any:
    """``item`` with the first samples of its batch, or None."""
    if isinstance(item, calibrate.Sample):
        return None
    whole = isinstance(vars(model).get("forward"), Program)
    if not whole and not any(isinstance(vars(module).get("forward"), Block) for module in model.modules()):
        return None
    args, kwargs = calibrate.arguments(item)
    some = first_samples((*args, *kwargs.values()))
    return some if some is None or not kwargs else dict(zip(kwargs, some, strict=True))


def _described(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200]}" if first else type(error).__name__


def _suspect(job: Job, error: Exception) -> str | None:
    """The converted layer that is most likely to blame: the innermost that was running or read when it was raised, or
    one below the innermost module that was running, first one that the line names.
    """
    names = {job.model.get_submodule(name): name for name in job.record.layers}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        for module in _modules_at(frame):
            if module in names:
                return names[module]
            text = linecache.getline(frame.f_code.co_filename, line)
            below = [(path, names[part]) for path, part in module.named_modules() if part in names]
            named = [name for path, name in below if re.search(rf"\b{re.escape(path.split('.')[0])}\b", text)]
            if found := [*named, *(name for _, name in below)]:
                return found[0]
    return None


def _modules_at(frame: types.FrameType) -> Iterator[nn.Module]:
    """The layers whose weights a call was given, and the module whose method it is."""
    for leaf in pytree.tree_leaves(frame.f_locals.get("args")):
        if isinstance(leaf, LinkedWeight) and isinstance(owner := leaf._source().owner, nn.Module):
            yield owner
    if isinstance(module := frame.f_locals.get("self"), nn.Module):
        yield module


def _give_back(job: Job, name: str, original: nn.Module | None) -> None:
    """Put the plain layer in the place of the converted one called ``name``, and what was fused into it in its own."""
    model, old = job.model, job.model.get_submodule(name)
    unfuse_activations(model, only=old)
    fused = isinstance(old, ConvLayer)
    if fused:
        remove_programs(model)
    if original is not None:
        plain = structure.copy_structure(original.get_submodule(name))
    else:
        plain = layers.plain_of(old)  # type: ignore[arg-type]
    layers.carry_over(old, plain)
    job.places.replace(old, plain)
    for place, norm in list(job.model.named_modules()):
        if isinstance(norm, FoldedBatchNorm) and norm.source == name:
            whole = norm.without() if original is None else structure.copy_structure(original.get_submodule(place))
            job.places.replace(norm, whole.train(norm.training))
    if fused and any(isinstance(module, ConvLayer) for module in job.model.modules()):
        install_programs(job.model, job.record.untraced)
    structure.FastPaths.open(job.model)
    structure.FastPaths.close(job.model, layers.is_converted)


def _forget(model: nn.Module) -> None:
    """Drop what was prepared for the calls: whoever gets the model may never call it here."""
    for module in model.modules():
        if layers.is_converted(module):
            invalidate_calls(module)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                invalidate_packed(tensor)
