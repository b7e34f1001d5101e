"""``convert_model`` and ``revert_model``: swap the layers of a model for quantised ones, and back."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import nn

from tilewright.convert import arguments, calibrate, foreign_saves, layers, structure, timing, trial, tuned
from tilewright.convert.conversion import Conversion, Job, conversion_of, conversions_of
from tilewright.convert.graph import attention, fuse_activations, unfuse_activations
from tilewright.convert.network.blocks import install_blocks, remove_blocks
from tilewright.convert.network.program import remove_programs
from tilewright.convert.plan import FilterFunction, Plan, layers_of, make_plan, nothing_to_convert
from tilewright.convert.progress import Rest, track
from tilewright.convert.recipes import Pattern, Recipe, RecipeLike
from tilewright.convert.record import NOT_FASTER, detach, record_of, remember_original
from tilewright.convert.text import display_name, size
from tilewright.nn import FoldedBatchNorm

logger = logging.getLogger("tilewright")


def convert_model(
    model: nn.Module,
    recipe: RecipeLike = "int8",
    *,
    exclude: Pattern | Iterable[Pattern] = (),
    filter_fn: FilterFunction | None = None,
    heads: bool = False,
    calibration_data: Iterable[Any] | None = None,
    transform: calibrate.Transform | None = None,
    forward_fn: calibrate.ForwardFunction | None = None,
    example_inputs: Iterable[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    keep_if_faster: bool = False,
    fuse: bool = True,
    inplace: bool = False,
    calibration_memory: int = calibrate.CALIBRATION_MEMORY,
    progress: bool | None = None,
    tune: bool | None = None,
    keep_dequantized: bool = False,
) -> nn.Module:
    """Replace the layers of ``model`` by quantised ones and return the converted model.

    recipe: the name of a preset ("int8", "int4", ... see ``recipes.PRESETS``), a scheme, {pattern: scheme, preset or
        None}, or a ``Recipe``.
    exclude: patterns of layers to leave alone; that of a module leaves all layers inside alone. filter_fn: called as
        ``filter_fn(module, name)``; False leaves the layer alone. heads: convert output heads as well. They are left
        alone by default, as their errors go straight into the answer; a head is what ``get_output_embeddings()``
        returns or a direct child of the root called lm_head, head, score, classifier, ... A rule that spells out its
        name converts it too.
    calibration_data: sample inputs, as an iterable: a DataLoader, a list, a generator. Each is a mapping (keyword
        arguments), a tuple or list (positional) or a single argument. A mapping by itself is one sample; a tensor or an
        array holds one in each row. What ``forward`` has no place for is left out: labels beside an image, further
        keys. Float arrays are cast to the dtype of the model. For schemes that quantise activations: they then search a
        scale for each input channel, which lowers the error (``convert.calibrate.smoothing``), or fix one for the whole
        tensor, as convolutions do. It also gives the report an output error for every layer. The model runs in eval
        mode.
    transform: makes a sample input of each item of ``calibration_data``: of a sentence, of a row of a dataset.
    forward_fn: called as ``forward_fn(model, item)`` to run the model on what ``transform`` made or on an example
        input, where ``model(item)`` does not.
    example_inputs: inputs as the model will see them, one (a mapping or a tensor) or an iterable of them. Each linear
        layer is then timed before and after, side by side on what reaches it, on the device where it is; ``report``
        shows both times.
    keep_if_faster: give back every linear layer that is not faster on ``example_inputs`` than it was, with both times
        as the reason. Convolutions hand integers to each other, so they are timed together, in the whole model, and
        all or none are kept.
    fuse: let a layer apply the activation module that follows it, where tracing shows that nothing else reads what lies
        between (``convert.graph.activations``); the activation is then taken in float32, before the only cast. And
        compute the attention of transformers by a kernel of ours where that is the same (``convert.graph.attention``).
    inplace: change ``model`` itself and free each float weight as soon as its replacement exists. Otherwise ``model``
        is left as it was, and the result shares every parameter and buffer that was not converted with it.
    calibration_memory: how many bytes may be held of what reaches layers while the calibration data goes through the
        model: the rows that are kept of a linear layer's input, 512 where there is room and one at least, the inputs
        of convolutional networks that errors are measured on, those of one call at least, and where there is room what
        their convolutions read and return, which then need not be computed a second time. What the model itself makes
        of one sample input comes on top.
    progress: True or False shows or hides a progress bar; None shows one for many layers when stderr is a terminal.
    tune: whether to time, on a CPU, which implementations serve the converted linear layers fastest, and remember it
        for this machine (docs/autotune.md). None: where ``calibration_data`` or ``example_inputs`` show how many rows
        layers see, for at most two seconds and not with ``TILEWRIGHT_AUTOTUNE=0``. True: also without them, for 1, 16,
        128 and 512 rows, for at most ten. Nothing is remembered where other processes use the machine; the report says
        what came of it.
    keep_dequantized: spend memory for speed: on a CPU, layers with float activations hold their weight dequantised as
        well, and calls with many rows use that where the float library is faster with it; calls with few rows read the
        compact weight. It is made when a call first wants it, and never saved; ``report`` says how many bytes it takes.
        Layers with int8 activations are as without. Raises ValueError for a recipe that makes no other layers.

    Layers that cannot be converted, tied weights and heads are left alone; ``report`` lists them with the reason. Where
    there are sample inputs, the converted model is called once on one of them, and a layer that raises is given back.
    Adapters come first: PEFT adds none to converted layers, but those that a model has keep working beside them.
    A model in training mode is converted as in eval mode, and left in training mode; the log and the report say so.
    Raises ValueError for a pattern that matches nothing, if nothing would be converted, for ``keep_if_faster`` without
    ``example_inputs`` and ``transform`` without ``calibration_data``, and for NaN or Inf in sample inputs; TypeError if
    ``model`` is no ``nn.Module``, compiled or scripted, and for an argument of a wrong kind, which it names. What the
    model raises on a sample input comes as ValueError, TypeError or RuntimeError with the index of that input. Where
    ``keep_if_faster`` gives every layer back that is no error: the model comes back as it was, with the reasons in its
    report.

    >>> import tilewright as tw
    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    >>> small = tw.convert_model(model, {"0": "int4-g32", "*": "int8"})
    """
    arguments.check_model(model)
    arguments.check_switches(heads=heads, keep_if_faster=keep_if_faster, fuse=fuse, inplace=inplace)
    if tune is not None:
        arguments.check_switches(tune=tune)
    if keep_if_faster and example_inputs is None:
        raise ValueError("keep_if_faster needs example_inputs: what is faster depends on what the model is called on")
    if transform is not None and calibration_data is None:
        raise ValueError("transform makes inputs of the items of calibration_data, which was not given")
    arguments.check_switches(keep_dequantized=keep_dequantized)
    recipe = Recipe.of(recipe).excluding(arguments.excluded(model, exclude))
    recipe = recipe.keeping_dequantized() if keep_dequantized else recipe
    filter_fn = arguments.checked_filter(filter_fn)
    data = examples = None
    if calibration_data is not None:
        data = calibrate.samples(model, calibration_data, transform=transform, forward_fn=forward_fn)
    if example_inputs is not None:
        examples = list(calibrate.samples(model, example_inputs, "example_inputs", forward_fn=forward_fn))
    trains = structure.trains(model)
    memory = arguments.checked_bytes("calibration_memory", calibration_memory)
    items = len(calibration_data) if isinstance(calibration_data, Sized) else None
    if isinstance(calibration_data, Mapping):
        items = 1
    options = (keep_if_faster, fuse, inplace, progress, memory, items, tune)
    made = _convert(model, recipe, filter_fn, heads, data, examples, *options)
    if trains:
        logger.warning("%s is in training mode: call model.eval() before inference", type(model).__name__)
    return made


def _convert(
    model: nn.Module,
    recipe: Recipe,
    filter_fn: FilterFunction | None = None,
    heads: bool = False,
    data: Iterator[Any] | None = None,
    examples: list[Any] | None = None,
    keep_if_faster: bool = False,
    fuse: bool = True,
    inplace: bool = False,
    progress: bool | None = None,
    memory: int = calibrate.CALIBRATION_MEMORY,
    items: int | None = None,
    tune: bool | None = False,
) -> nn.Module:
    """``convert_model`` with arguments in their final form. data, examples: inputs as ``calibrate.call`` takes them.
    items: how many the data has, if that is known.
    """
    plan = make_plan(model, recipe, filter_fn, heads)
    reached = _reached(model, plan, examples)
    for kind, planned in conversions_of(plan).items():
        if planned:
            kind.check(model)
            if keep_if_faster and examples is not None and kind.whole_model:
                kept = None if data is None else list(data)  # it is run through the model twice
                data = None if kept is None else iter(kept)
                again = None if kept is None else iter(kept)
                convert = functools.partial(
                    _convert, model, recipe, heads=heads, data=again, progress=progress, memory=memory, items=items
                )
                _leave_what_is_slow(model, plan, planned, examples, convert)
    known, original = record_of(model), model
    if not inplace:
        model = structure.copy_structure(original)
    record = copy.deepcopy(known)
    record.recipes.append(recipe.to_json())
    record.skipped = plan.skipped
    first, data = calibrate.first_of(data)
    held, rest = calibrate.Memory(memory), _rest(plan, first is not None)
    places, with_data = structure.Places(model), first is not None
    job = Job(places, plan, record, with_data, reached, held, keep_if_faster, progress, rest, items)
    conversions = [kind(job, planned) for kind, planned in conversions_of(plan).items()]
    try:
        for each in conversions:
            each.prepare(first)
        samples = _observe(job, conversions, data)
        for each in conversions:
            each.replace(samples)
        if fuse:
            for source in fuse_activations(job.model).values():
                record.layers[source].label += f" + {job.model.get_submodule(source).activation}"
            if any(name in record.layers for name in plan.convert):
                record.attention = sorted({*record.attention, *attention.use(job.model)})
    finally:
        for each in conversions:
            each.finish()
        model = job.model
        # Also if a layer failed in place: what was converted until then must keep working and be reported.
        structure.FastPaths.close(model, layers.is_converted)
        install_blocks(model)
        foreign_saves.guard(model)
        record.skipped = {name: reason for name, reason in record.skipped.items() if name not in record.layers}
        record.attach(model)
    inputs = [*(examples or [])[:1], *samples]
    trial.give_back_what_raises(job, None if inplace else original, inputs)
    model = job.model
    if tuned.wanted(tune, bool(inputs)):
        record.timing = tuned.time_candidates(model, inputs, bool(tune))
    record.attach(model)
    if not any(name in record.layers for name in plan.convert):
        if any(reason.startswith(NOT_FASTER) for reason in record.skipped.values()):
            logger.warning("no layer is faster converted: the model is as it was")
            return model
        known.attach(model)
        raise ValueError(nothing_to_convert(model, record.skipped))
    if not inplace:
        remember_original(model, original)
    before = sum(layer.bytes_before for layer in record.layers.values())
    after = sum(layer.bytes_after for layer in record.layers.values())
    count, left = len(record.layers), len(record.skipped)
    logger.info("converted %d layers, %s to %s; %d left alone", count, size(before), size(after), left)
    return model


def _rest(plan: Plan, with_data: bool) -> Rest:
    """What the phases of a conversion take beside each other, roughly as for ResNet-50 and all-MiniLM-L6-v2."""
    whole = any(conversion_of(planned).whole_model for planned in plan.convert.values())
    linear = any(not conversion_of(planned).whole_model for planned in plan.convert.values())
    shares = {
        "Fusing": 2.0 if whole else 0.0,
        "Calibrating": 3.0 if with_data else 0.0,
        "Quantising": 1.0 if whole and with_data else 0.0,
        "Measuring": 3.0 if whole and with_data else 0.0,
        "Converting": 4.0 if linear and not whole else 0.5 if linear else 0.0,
        "Trying": 2.0 if with_data else 0.0,
    }
    return Rest({name: share for name, share in shares.items() if share})


def _observe(job: Job, conversions: list[Conversion], data: Iterable[Any] | None) -> list[Any]:
    """Run the calibration data through the model while all conversions observe it. Returns its first item, if any."""
    planned = job.plan.convert.items()
    if data is None:
        for name, each in planned:
            if each.scheme.needs_data:
                raise ValueError(f"{each.scheme}, the scheme of {display_name(name)!r}, needs calibration_data")
        return []
    if not any(each.scheme.calibrated for _, each in planned):
        logger.warning("no scheme of this recipe makes use of calibration_data; it only measures output errors")
    kept: list[Any] = []

    def stream() -> Iterator[Any]:
        for item in track(data, "Calibrating", job.progress, job.rest, job.items):
            if not kept:
                kept.append(item)
            yield item

    with contextlib.ExitStack() as stack:
        for conversion in conversions:
            stack.enter_context(conversion.observing())
        if not calibrate.run(job.model, stream()):
            raise ValueError("calibration_data is empty")
    return kept


def _leave_what_is_slow(
    model: nn.Module,
    plan: Plan,
    planned: Iterable[str],
    examples: list[Any],
    convert: Callable[..., nn.Module],
) -> None:
    """Take the layers ``planned`` out of ``plan`` unless a copy of ``model`` is faster with them converted."""
    together = {model.get_submodule(name) for name in planned}
    converted = convert(filter_fn=lambda module, name: module in together)
    times = timing.compare_models(model, converted, examples)
    if times.slower:
        for name in planned:
            del plan.convert[name]
            plan.skipped[name] = f"{NOT_FASTER}: the whole model takes {times.describe()}"


def _reached(model: nn.Module, plan: Plan, examples: list[Any] | None) -> dict[str, list[timing.Reached]]:
    """What reaches each layer that is to be converted, and timed, by itself."""
    if examples is None:
        return {}
    names = [name for name, planned in plan.convert.items() if not conversion_of(planned).whole_model]
    return timing.inputs_of(model, {name: model.get_submodule(name) for name in names}, examples)


def revert_model(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give the plain layers back, with dequantised weights in the original dtype.

    The values are those that the quantised layers stood for, not the ones from before the conversion. A batch-norm that
    was folded into a convolution stays there, which then has a bias: its place is taken by ``nn.Identity``. A bias that
    did nothing but correct the rounding of an int8 convolution goes, so that layers have the parameters they had.
    inplace: change ``model`` itself. Raises ValueError if the model holds no converted layer.

    >>> import tilewright as tw
    >>> model = tw.revert_model(tw.convert_model(nn.Sequential(nn.Linear(64, 64)), "int8"))
    >>> type(model[0]).__name__
    'Linear'
    """
    arguments.check_model(model)
    if not any(map(layers.is_converted, model.modules())):
        raise ValueError(f"{type(model).__name__} holds no converted layer, so there is nothing to revert")
    if not inplace:
        model = structure.copy_structure(model)
    unfuse_activations(model)
    remove_programs(model)
    remove_blocks(model)
    places = structure.Places(model)
    for old, names in layers_of(model).items():
        if isinstance(old, layers.CONVERTED):
            new = layers.plain_of(old)
            layers.carry_over(old, new)
            places.replace(old, new)
            logger.debug("reverted %s", display_name(names[0]))
    for norm in [module for module in places.root.modules() if isinstance(module, FoldedBatchNorm)]:
        places.replace(norm, norm.without().train(norm.training))
    model = places.root
    structure.FastPaths.open(model)
    foreign_saves.guard(model)
    attention.restore(model)
    detach(model)
    return model
