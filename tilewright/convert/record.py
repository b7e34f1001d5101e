"""The record of a conversion: what became of each layer. A plain attribute of the root module, made of JSON types.

As an attribute it follows the model through ``deepcopy`` and pickling and stays out of the ``state_dict``; checkpoints
write it into their manifest.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tilewright.convert.structure import ReplacedForward

ATTRIBUTE = "_tilewright_record"
#: How the reason begins for which ``keep_if_faster`` gave a layer back.
NOT_FASTER = "not faster converted"


@dataclass
class LayerRecord:
    """One converted layer.

    scheme: its JSON form. label: the same as a reader sees it. bytes_before, bytes_after: of weight, scales and bias.
    weight_error: ||W' - W|| / ||W|| of the dequantised weight W'. output_error: the same of the layer's output on the
    calibration rows, if there were any. smoothing: the exponent found for ``channel_scale``, if there is one. note:
    what else a reader of the report should know. microseconds_before, microseconds_after: of the layer as it was and as
    it is, on the example inputs, if they were given.
    """

    scheme: dict[str, Any]
    label: str
    bytes_before: int
    bytes_after: int
    weight_error: float | None = None
    output_error: float | None = None
    smoothing: float | None = None
    note: str = ""
    microseconds_before: float | None = None
    microseconds_after: float | None = None


@dataclass(frozen=True)
class OtherRecord:
    """Tensors outside of layers: see ``account.ReportedOther``."""

    kind: str
    what: str
    reason: str


@dataclass
class Record:
    """One model. recipes: the JSON forms of those applied, in order. layers: by name. skipped: name -> reason.

    untraced: modules whose code could not be read as a graph, so that nothing was fused across it: name -> reason.
    attention: modules whose config names our attention (``convert.graph.attention``). others: what lies outside of
    layers, in checkpoints alone: a model shows it itself. timing: what came of timing implementations for its layers
    (``tuned``), on the machine where it was converted.
    """

    recipes: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)
    others: dict[str, OtherRecord] = field(default_factory=dict)
    timing: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-able dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record that ``to_json`` wrote. Raises TypeError, ValueError or KeyError for anything else."""
        layers = {str(name): LayerRecord(**layer) for name, layer in data["layers"].items()}
        for name, layer in layers.items():
            if not isinstance(layer.label, str) or not isinstance(layer.note, str):
                raise ValueError(f"the label or note of {name!r} is no text")
            if not isinstance(layer.bytes_before, int) or not isinstance(layer.bytes_after, int):
                raise ValueError(f"the byte counts of {name!r} are not integers")
            numbers = (layer.weight_error, layer.output_error, layer.smoothing)
            for error in (*numbers, layer.microseconds_before, layer.microseconds_after):
                if error is not None and not isinstance(error, (int, float)):
                    raise ValueError(f"an error or time of {name!r} is not a number")
        skipped = {str(name): str(reason) for name, reason in data["skipped"].items()}
        untraced = {str(name): str(reason) for name, reason in data.get("untraced", {}).items()}
        attention = [str(name) for name in data.get("attention", [])]
        others = {str(name): OtherRecord(**told) for name, told in data.get("others", {}).items()}
        if not all(isinstance(value, str) for told in others.values() for value in vars(told).values()):
            raise ValueError("what lies outside of layers is not told in words")
        timing = str(data.get("timing", ""))
        return cls(list(data["recipes"]), layers, skipped, untraced, attention, others, timing)

    def attach(self, model: nn.Module) -> None:
        """Make this the record of ``model``, in place of any that it or a part of it has."""
        detach(model)
        vars(model)[ATTRIBUTE] = self


def detach(model: nn.Module) -> None:
    """Remove every record from the model."""
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)


def record_of(model: nn.Module) -> Record:
    """What is known about the layers of ``model``, also from records of its parts. Empty if nothing is."""
    found, refused = Record(), dict[str, str]()
    for prefix, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, ReplacedForward) and forward.refused is not None:
            refused[prefix] = forward.refused
        part = vars(module).get(ATTRIBUTE)
        if isinstance(part, Record):
            found.recipes += part.recipes
            found.layers |= {join(prefix, name): layer for name, layer in part.layers.items()}
            found.skipped |= {join(prefix, name): reason for name, reason in part.skipped.items()}
            found.untraced |= {join(prefix, name): reason for name, reason in part.untraced.items()}
            found.attention += [join(prefix, name) for name in part.attention]
            found.timing = found.timing or part.timing
    found.untraced |= refused
    return found


_originals: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def remember_original(model: nn.Module, original: nn.Module) -> None:
    """Note which model ``model`` was converted from, keeping neither alive. Copies of ``model`` do not inherit it."""
    _originals[model] = weakref.ref(original)


def original_of(model: nn.Module) -> nn.Module | None:
    """The model that ``model`` was converted from, if it is still there."""
    found = _originals.get(model)
    return None if found is None else found()


def join(prefix: str, name: str) -> str:
    """Dotted name of ``name`` below ``prefix``; either may be empty."""
    return ".".join(part for part in (prefix, name) if part)
