"""``report``: what was done to each layer, what that saves and costs, which kernel serves it; or why nothing was."""

from __future__ import annotations

import dataclasses
import io
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tilewright.convert import calibrate
from tilewright.convert.plan import layers_of
from tilewright.convert.record import LayerRecord, Record, original_of, record_of
from tilewright.convert.schemes import registered_schemes
from tilewright.convert.structure import tensor_bytes
from tilewright.convert.text import display_name, listed, size
from tilewright.kernels.dispatch.router import Decision, describe, route
from tilewright.nn import ConvLayer, QuantizedLinear

#: Batch sizes (rows of activations) that the report asks the router about.
BATCHES = (1, 256)


@dataclass(frozen=True)
class ReportedLayer:
    """One layer.

    kind: class of the module. device: "cpu", "cuda", ... scheme: what was done, "" if nothing. implementations: for
    each of ``BATCHES`` what the router chooses on the device where the layer is. declined: implementations that are
    preferred to the chosen one but do not take the layer, with the reason. bytes: of weight, scales and bias.
    weight_error, output_error: relative, ||y' - y|| / ||y||; None if not known. reason: why it was left alone.
    microseconds_before, microseconds_after: on the example inputs of the conversion, if there were any.
    """

    name: str
    kind: str
    device: str
    scheme: str
    implementations: dict[int, str]
    declined: dict[int, list[str]]
    bytes_before: int
    bytes_after: int
    weight_error: float | None = None
    output_error: float | None = None
    smoothing: float | None = None
    reason: str = ""
    microseconds_before: float | None = None
    microseconds_after: float | None = None


@dataclass(frozen=True)
class Report:
    """What ``report`` found. ``str()`` gives a table. model_bytes: of all parameters and buffers, before and after.

    untraced: modules whose code could not be read as a graph, so that convolutions were not fused across it, with the
    reason. attention: modules whose attention is computed by a kernel of ours where it takes the call.
    """

    model: str
    layers: tuple[ReportedLayer, ...]
    model_bytes_before: int
    model_bytes_after: int
    untraced: dict[str, str] = dataclasses.field(default_factory=dict)
    attention: tuple[str, ...] = ()

    @property
    def converted(self) -> list[ReportedLayer]:
        """The converted layers."""
        return [layer for layer in self.layers if layer.scheme]

    @property
    def skipped(self) -> list[ReportedLayer]:
        """The layers left alone."""
        return [layer for layer in self.layers if not layer.scheme]

    @property
    def totals(self) -> dict[str, Any]:
        """Counts and bytes: of the converted layers and of the whole model."""
        before = sum(layer.bytes_before for layer in self.converted)
        after = sum(layer.bytes_after for layer in self.converted)
        return {
            "layers_converted": len(self.converted),
            "layers_skipped": len(self.skipped),
            "layer_bytes_before": before,
            "layer_bytes_after": after,
            "layer_ratio": after / before if before else None,
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            "model_ratio": self.model_bytes_after / self.model_bytes_before if self.model_bytes_before else None,
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict: the totals, then every layer."""
        return {
            "model": self.model,
            "totals": self.totals,
            "untraced": self.untraced,
            "attention": list(self.attention),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }

    def headlines(self) -> list[str]:
        """The totals in words, one fact a line."""
        totals = self.totals
        if not self.converted:
            lines = [f"{self.model}: nothing converted, {totals['layers_skipped']} layers are as they were"]
        else:
            lines = [
                f"{self.model}: {totals['layers_converted']} layers converted, {totals['layers_skipped']} left alone"
            ]
            for part, label in (("layer", "converted layers"), ("model", "whole model")):
                before, after, ratio = (totals[f"{part}_{key}"] for key in ("bytes_before", "bytes_after", "ratio"))
                lines.append(f"{label}: {size(before)} -> {size(after)} ({ratio:.3f}x)")
            counts = Counter(layer.scheme for layer in self.converted)
            lines += [f"{scheme} ({count} layers)" for scheme, count in counts.items()]
        if self.attention:
            lines.append(f"attention of {len(self.attention)} modules by tilewright::attention in inference on a CPU")
        return lines

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of converted layers."""
        has_output = any(layer.output_error is not None for layer in self.converted)
        header = ["layer", "scheme", *(f"M={m}" for m in BATCHES), "before", "after", "weight err."]
        header += ["output err."] if has_output else []
        timed = any(layer.microseconds_after is not None for layer in self.converted)
        header += ["us before", "us after"] if timed else []
        # The headlines spell the options out. In the table they would only take room, unless two layers differ in them.
        names = Counter(scheme.partition(":")[0] for scheme in {layer.scheme for layer in self.converted})
        rows = []
        for layer in self.converted:
            name = layer.scheme.partition(":")[0]
            scheme = name if names[name] == 1 else layer.scheme
            row = [display_name(layer.name), scheme, *(layer.implementations[m] for m in BATCHES)]
            row += [size(layer.bytes_before), size(layer.bytes_after), _percent(layer.weight_error)]
            row += [_percent(layer.output_error)] if has_output else []
            times = (layer.microseconds_before, layer.microseconds_after)
            rows.append(row + (["-" if time is None else f"{time:.4g}" for time in times] if timed else []))
        return header, rows

    def _notes(self) -> list[str]:
        """Why the router passed over implementations that are preferred to the chosen one, each reason once; then what
        the conversion had to say.
        """
        found: dict[str, tuple[set[int], list[str]]] = {}
        for layer in self.converted:
            for m, reasons in layer.declined.items():
                for reason in reasons:
                    # What is made for another kind of device is no loss here. The JSON form has it all the same.
                    if not reason.endswith(f"not on {layer.device}"):
                        batches, names = found.setdefault(reason, (set(), []))
                        batches.add(m)
                        if display_name(layer.name) not in names:
                            names.append(display_name(layer.name))
        notes = [
            f"M={', '.join(map(str, sorted(batches)))}: not by {reason} ({listed(names, 2)})"
            for reason, (batches, names) in found.items()
        ]
        said: dict[str, list[str]] = {}
        for layer in self.converted:
            if layer.reason:
                said.setdefault(layer.reason, []).append(display_name(layer.name))
        notes += [f"{reason} ({listed(names, 2)})" for reason, names in said.items()]
        notes += [f"{display_name(name)} does not trace: {reason}" for name, reason in self.untraced.items()]
        return notes

    def to_markdown(self) -> str:
        """The totals, a table of the converted layers and a table of those left alone, with reasons."""
        parts = ["\n".join(f"- {line}" for line in self.headlines())]
        if self.converted:
            parts.append(_markdown(*self._rows()))
        if notes := self._notes():
            parts.append("\n".join(f"- {note}" for note in notes))
        if self.skipped:
            rows = [[display_name(layer.name), layer.kind, layer.reason] for layer in self.skipped]
            parts.append(_markdown(["left alone", "type", "reason"], rows))
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        """The same as a text table; coloured and as wide as the terminal if stdout is one."""
        from rich.console import Console, RenderableType
        from rich.table import Table

        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size((100, 24)).columns

        def table(header: list[str], rows: list[list[str]]) -> RenderableType:
            made = Table(box=None, pad_edge=False, header_style="bold")
            for title in header:
                # A cut name or reason helps nobody: cells fold instead. Numbers stay whole.
                numeric = title.endswith(("before", "after", "err."))
                whole = numeric or (title == "scheme" and width >= 80 and all(_fits(row[1]) for row in rows))
                made.add_column(title, overflow="fold", no_wrap=whole, justify="right" if numeric else "left")
            for row in rows:
                made.add_row(*row)
            return made

        console = Console(
            file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False
        )
        for line in self.headlines():
            console.print(line, style="bold", soft_wrap=True)
        if self.converted:
            console.print()
            console.print(table(*self._rows()))
        for note in self._notes():
            console.print(note, style="dim")
        if self.skipped:
            console.print()
            rows = [[display_name(layer.name), layer.kind, layer.reason] for layer in self.skipped]
            console.print(table(["left alone", "type", "reason"], rows))
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def _fits(scheme: str) -> bool:
    return ":" not in scheme and len(scheme) <= 24


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.2f} %"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def report(
    model: nn.Module,
    example_inputs: Iterable[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    original: nn.Module | None = None,
) -> Report:
    """What became of each layer of a model that ``convert_model`` made or ``load_model`` read.

    example_inputs: sample inputs, one or an iterable of them, each a mapping (keyword arguments), a tuple or list
        (positional ones) or a tensor. The original model is run on them, and each converted layer on what reaches the
        same layer there: that gives its output error. Convolutions keep the error measured at conversion.
    original: the model before its conversion. Not needed as long as the model that was given to ``convert_model``
    exists.

    Without inputs the errors measured at conversion are shown: that of the weight, and that of the output if there was
    calibration data. A model without converted layers is reported as such. Raises ValueError if there are inputs but no
    original, or if that lacks a layer.
    """
    record = record_of(model)
    errors = {}
    if example_inputs is not None:
        original = original or original_of(model)
        if original is None:
            raise ValueError("an output error needs original=, the model before its conversion, which exists no longer")
        errors = _output_errors(model, original, example_inputs)
    found = [_layer(module, names[0], record, errors) for module, names in layers_of(model).items()]
    after = tensor_bytes(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in found)
    return Report(type(model).__name__, tuple(found), after + saved, after, record.untraced, tuple(record.attention))


def _layer(module: nn.Module, name: str, record: Record, errors: Mapping[str, float | None]) -> ReportedLayer:
    kind, held = type(module).__name__, tensor_bytes(module)
    device = next((tensor.device.type for tensor in [*module.parameters(), *module.buffers()]), "")
    if not isinstance(module, (QuantizedLinear, ConvLayer)):
        reason = record.skipped.get(name) or ("not converted" if record.layers else "the model was not converted")
        return ReportedLayer(name, kind, device, "", {}, {}, held, held, reason=reason)
    decisions = {m: _decision(module, m) for m in BATCHES}
    implementations = {m: d if isinstance(d, str) else describe(module.problem(m=m)) for m, d in decisions.items()}
    declined = {
        m: [] if isinstance(d, str) else [f"{other}: {reason}" for other, reason in d.declined]
        for m, d in decisions.items()
    }
    made = record.layers.get(name)
    if made is None:
        # Built by hand or taken out of a larger model: what can be seen is reported.
        float_bytes = math.prod(module.weight_shape) * module.dtype.itemsize
        bias = module.bias.numel() * module.bias.element_size() if module.bias is not None else 0
        return ReportedLayer(
            name, kind, device, module.scheme_name, implementations, declined, float_bytes + bias, held
        )
    return ReportedLayer(
        name,
        kind,
        device,
        _label(made),
        implementations,
        declined,
        made.bytes_before,
        held,
        made.weight_error,
        errors.get(name, made.output_error),
        made.smoothing,
        made.note,
        made.microseconds_before,
        made.microseconds_after,
    )


def _label(made: LayerRecord) -> str:
    """What was done. Older checkpoints say the class of the scheme in place of the stem of its format."""
    kind = registered_schemes().get(str(made.scheme.get("scheme")))
    return made.label.replace(kind.__name__, kind.stem(), 1) if kind else made.label


def _decision(module: QuantizedLinear | ConvLayer, m: int) -> Decision | str:
    try:
        return route(module.problem(m=m))
    except NotImplementedError as error:
        return str(error)


def _output_errors(model: nn.Module, original: nn.Module, example_inputs: Any) -> dict[str, float | None]:
    """Relative output error of every converted layer, on the inputs that reach the same layer of the original."""
    if isinstance(example_inputs, (Mapping, torch.Tensor)):
        example_inputs = [example_inputs]  # a single one
    converted = {names[0]: module for module, names in layers_of(model).items() if isinstance(module, QuantizedLinear)}
    modules = dict(original.named_modules(remove_duplicate=False))
    if missing := [display_name(name) for name in converted if name not in modules]:
        raise ValueError(f"original ({type(original).__name__}) has no layer called {listed(missing)}")
    plain = {name: modules[name] for name in converted}
    samples = calibrate.observe(original, plain, example_inputs)
    return {name: calibrate.output_error(plain[name], converted[name], samples[name]) for name in converted}
