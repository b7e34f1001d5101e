"""``report`` looks at a model, and at what is recorded of its conversion, for what ``Report`` then says."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from tilewright.convert import calibrate
from tilewright.convert.account import Account, ReportedOther, account_of
from tilewright.convert.arguments import check_module
from tilewright.convert.network.blocks import states_of
from tilewright.convert.plan import layers_of
from tilewright.convert.record import LayerRecord, Record, original_of, record_of
from tilewright.convert.report import BATCHES, Report, ReportedLayer
from tilewright.convert.schemes import registered_schemes
from tilewright.convert.structure import trains
from tilewright.convert.text import display_name, listed
from tilewright.kernels.dispatch.router import describe, route
from tilewright.nn import ConvLayer, FusedActivation, QuantizedLinear
from tilewright.nn.taken_over import TakesActivation

#: Imported by whoever makes a cache, since it needs transformers.
_INT8_CACHE = "tilewright.convert.graph.int8_cache"


def report(
    model: nn.Module,
    example_inputs: Iterable[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    original: nn.Module | None = None,
    *,
    transform: calibrate.Transform | None = None,
    forward_fn: calibrate.ForwardFunction | None = None,
    cache: Any = None,
) -> Report:
    """What became of each layer of a model that ``convert_model`` made or ``load_model`` read.

    example_inputs: sample inputs, in the forms that ``convert_model`` takes as ``calibration_data``. The original model
        is run on them, and each converted layer on what reaches the same layer there: that gives its output error.
        Convolutions keep the error measured at conversion.
    original: the model before its conversion. Not needed as long as the model that was given to ``convert_model``
    exists. transform, forward_fn: of ``example_inputs``, as of ``convert_model``. cache: an ``Int8Cache`` that the
        model has written to, whose bytes and error are reported.

    Without inputs the errors measured at conversion are shown: that of the weight, and that of the output if there was
    calibration data. A model without converted layers is reported as such. Raises ValueError if there are inputs but no
    original, or if that lacks a layer; TypeError for a cache of another kind.
    """
    check_module(model)
    if cache is not None and not isinstance(cache, getattr(sys.modules.get(_INT8_CACHE), "Int8Cache", ())):
        raise TypeError(f"cache must be a tilewright.Int8Cache, not {type(cache).__name__}")
    record = record_of(model)
    errors = {}
    if example_inputs is not None:
        original = original or original_of(model)
        if original is None:
            raise ValueError("an output error needs original=, the model before its conversion, which exists no longer")
        inputs = calibrate.samples(original, example_inputs, "example_inputs", transform, forward_fn)
        errors = _output_errors(model, original, inputs)
    modules = layers_of(model)
    account = account_of(model, modules)
    found = [_layer(module, names[0], record, errors, account) for module, names in modules.items()]
    found = [_with_note(each, _why_astray(model, each.name)) for each in found]
    whole = whole_report(type(model).__name__, found, account.others, record, trains(model), states_of(model))
    return whole if cache is None else replace(whole, cache=str(cache))


def whole_report(
    model: str,
    layers: list[ReportedLayer],
    others: list[ReportedOther],
    record: Record,
    training: bool,
    programs: Mapping[str, str] = MappingProxyType({}),
) -> Report:
    """The report of a model that holds these parts and nothing else."""
    rest = sum(other.bytes for other in others)
    before = rest + sum(layer.bytes_before for layer in layers)
    after = rest + sum(layer.bytes_after for layer in layers)
    attention = tuple(record.attention)
    told = (record.untraced, attention, tuple(others), training, dict(programs), record.timing)
    return Report(model, tuple(layers), before, after, *told)


def _layer(
    module: nn.Module, name: str, record: Record, errors: Mapping[str, float | None], account: Account
) -> ReportedLayer:
    kind, held, shared = type(module).__name__, account.layers[name], account.shared[name]
    device = next((tensor.device.type for tensor in [*module.parameters(), *module.buffers()]), "")
    if not isinstance(module, (QuantizedLinear, ConvLayer)):
        reason = record.skipped.get(name) or ("not converted" if record.layers else "the model was not converted")
        return ReportedLayer(name, kind, device, "", {}, {}, held, held, reason=reason)
    implementations: dict[int, str] = {}
    declined: dict[int, list[str]] = {}
    origins: dict[int, str] = {}
    for m in BATCHES:
        try:
            decision = route(module.problem(m=m))
            implementations[m] = describe(module.problem(m=m))
            declined[m] = [f"{other}: {reason}" for other, reason in decision.declined]
            origins[m] = decision.origin
        except NotImplementedError as nobody:
            implementations[m], declined[m] = str(nobody), []
    made = record.layers.get(name)
    if made is None:
        # Built by hand or taken out of a larger model: what can be seen is reported.
        float_bytes = math.prod(module.weight_shape) * module.dtype.itemsize
        bias = module.bias.numel() * module.bias.element_size() if module.bias is not None else 0
        made = LayerRecord({}, module.scheme_name, float_bytes + bias, held + shared)
    served = {"device": device, "implementations": implementations, "declined": declined, "origins": origins}
    seen = {"bytes_before": made.bytes_before - shared, "bytes_after": held}
    if isinstance(module, QuantizedLinear):
        seen["bytes_kept"] = module.kept_bytes()
    return from_record(name, kind, made, **served, **seen, output_error=errors.get(name, made.output_error))


def _why_astray(model: nn.Module, name: str) -> str:
    """What is odd about the activation that the layer ``name`` has taken over; "" if nothing is."""
    parent, _, attribute = name.rpartition(".")
    siblings = model.get_submodule(parent)._modules
    layer = siblings.get(attribute) if name else None
    if not isinstance(layer, TakesActivation) or not layer.fused_activation:
        return ""
    place = siblings.get(layer.fused_activation)
    if isinstance(place, FusedActivation) and place.source == attribute:
        return ""
    here = "there is no such module here" if place is None else f"here that is a {type(place).__name__}"
    return (
        f"it applies {layer.activation} for the module {layer.fused_activation!r} of the model that it was taken from, "
        f"and {here}: convert with fuse=False before layers are moved"
    )


def _with_note(layer: ReportedLayer, note: str) -> ReportedLayer:
    return replace(layer, reason="; ".join(filter(None, (layer.reason, note))))


def from_record(name: str, kind: str, made: LayerRecord, **seen: Any) -> ReportedLayer:
    """A converted layer by its record. seen: what only the layer itself tells, or tells better than the record."""
    numbers = {key: value for key, value in vars(made).items() if key not in ("scheme", "label", "note")}
    known = {"device": "", "implementations": {}, "declined": {}, **numbers, **seen}
    return ReportedLayer(name, kind, scheme=_label(made), reason=made.note, **known)


def _label(made: LayerRecord) -> str:
    """What was done. Older checkpoints say the class of the scheme in place of the stem of its format."""
    kind = registered_schemes().get(str(made.scheme.get("scheme")))
    return made.label.replace(kind.__name__, kind.stem(), 1) if kind else made.label


def _output_errors(model: nn.Module, original: nn.Module, example_inputs: Iterable[Any]) -> dict[str, float | None]:
    """Relative output error of every converted layer, on the inputs that reach the same layer of the original."""
    converted = {names[0]: module for module, names in layers_of(model).items() if isinstance(module, QuantizedLinear)}
    modules = dict(original.named_modules(remove_duplicate=False))
    if missing := [display_name(name) for name in converted if name not in modules]:
        raise ValueError(f"original ({type(original).__name__}) has no layer called {listed(missing)}")
    plain = {name: modules[name] for name in converted}
    samples = calibrate.observe(original, plain, example_inputs, called="example_inputs")
    return {name: calibrate.output_error(plain[name], converted[name], samples[name]) for name in converted}
