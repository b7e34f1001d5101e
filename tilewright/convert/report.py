"""``Report``: what was done to each layer, what that saves and costs, which kernel serves it; or why nothing was.

Every byte of the model stands in one line, of a layer or of what lies outside of them (``account``).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tilewright.convert.account import ReportedOther
from tilewright.convert.table import Column, fit, wrapped
from tilewright.convert.text import by_reason, display_name, listed, name_patterns, percent, size
from tilewright.kernels.dispatch.router import ORDER

#: Batch sizes (rows of activations) that the report asks the router about.
BATCHES = (1, 256)


@dataclass(frozen=True)
class ReportedLayer:
    """One layer.

    kind: class of the module. device: "cpu", "cuda", ... scheme: what was done, "" if nothing. implementations: for
    each of ``BATCHES`` what the router chooses on the device where the layer is. declined: implementations that are
    preferred to the chosen one but do not take the layer, with the reason. origins: from where each choice came: "timed
    here on <date>", "shipped table", "order of preference", "chosen by the user". bytes: of weight, scales and bias;
    what lies in the memory of a tensor before it, such as a tied weight, is counted there.
    weight_error, output_error: relative, ||y' - y|| / ||y||; None if not known. reason: why it was left alone.
    microseconds_before, microseconds_after: on the example inputs of the conversion, if there were any. bytes_kept: of
    a weight that is kept dequantised, on top, in memory alone and once calls with many rows have come.
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
    origins: dict[int, str] = dataclasses.field(default_factory=dict)
    bytes_kept: int = 0


@dataclass(frozen=True)
class ReportedGroup:
    """Layers of one class, scheme and implementation whose names differ in numbers alone: ``layer.*.query``."""

    pattern: str
    layers: tuple[ReportedLayer, ...]

    def errors(self, which: str) -> str:
        """``0.39-0.52 %``: from the least to the largest that is known of ``weight_error`` or ``output_error``."""
        known = [error for layer in self.layers if (error := _known(getattr(layer, which))) is not None]
        if not known:
            return "-"
        least, most = f"{100 * min(known):.2f}", f"{100 * max(known):.2f}"
        return f"{most} %" if least == most else f"{least}-{most} %"

    def total(self, which: str) -> float | None:
        """The sum of a number of each layer, None if it is not known of all."""
        values = [getattr(layer, which) for layer in self.layers]
        return None if None in values else sum(values)


@dataclass(frozen=True)
class Report:
    """What ``report`` found. ``str()`` is what one sees at a glance: totals, like layers in one row, what was left
    alone; ``details()`` has every layer. model_bytes: of all parameters and buffers, before and after.

    untraced: modules whose code could not be read as a graph, so that convolutions were not fused across it, with the
    reason. attention: modules whose attention is computed by a kernel of ours where it takes the call. programs: how
    the blocks of a transformer run on a CPU, as one program or why not, by name. timing: what came of timing
    implementations for the layers when the model was converted. cache: what an ``Int8Cache`` that the report was given
    holds and what its codes lose, in words.
    """

    model: str
    layers: tuple[ReportedLayer, ...]
    model_bytes_before: int
    model_bytes_after: int
    untraced: dict[str, str] = dataclasses.field(default_factory=dict)
    attention: tuple[str, ...] = ()
    others: tuple[ReportedOther, ...] = ()
    training: bool = False
    programs: dict[str, str] = dataclasses.field(default_factory=dict)
    timing: str = ""
    cache: str = ""

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
        """Counts and bytes: of the converted layers and of the whole model. converted_share: the part of the model's
        bytes, before, that the converted layers held.
        """
        before = sum(layer.bytes_before for layer in self.converted)
        after = sum(layer.bytes_after for layer in self.converted)
        return {
            "layers_converted": len(self.converted),
            "layers_skipped": len(self.skipped),
            "layer_bytes_before": before,
            "layer_bytes_after": after,
            "layer_bytes_kept": sum(layer.bytes_kept for layer in self.converted),
            "layer_ratio": after / before if before else None,
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            "model_ratio": self.model_bytes_after / self.model_bytes_before if self.model_bytes_before else None,
            "converted_share": before / self.model_bytes_before if self.model_bytes_before else None,
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict: the totals, then every layer and what lies outside of them."""
        return {
            "model": self.model,
            "totals": self.totals,
            "training": self.training,
            "untraced": self.untraced,
            "attention": list(self.attention),
            "programs": self.programs,
            "timing": self.timing,
            "cache": self.cache,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "others": [dataclasses.asdict(other) for other in self.others],
        }

    def groups(self, every_layer: bool = False) -> list[ReportedGroup]:
        """The converted layers, those that share all but numbers in their names as one. In the model's order.

        every_layer: each as a group of its own.
        """
        if every_layer:
            return [ReportedGroup(display_name(layer.name), (layer,)) for layer in self.converted]
        alike: dict[Any, dict[str, ReportedLayer]] = {}
        for layer in self.converted:
            key = (layer.kind, layer.device, layer.scheme, *layer.implementations.values())
            alike.setdefault(key, {})[layer.name] = layer
        everything = [layer.name for layer in self.layers]
        found = [
            ReportedGroup(display_name(pattern), tuple(layers[name] for name in names))
            for layers in alike.values()
            for pattern, names in name_patterns(layers, everything).items()
        ]
        return sorted(found, key=lambda group: self.layers.index(group.layers[0]))

    def headlines(self) -> list[str]:
        """The totals in words, one fact a line."""
        totals = self.totals
        if not self.converted:
            lines = [f"{self.model}: nothing converted, {totals['layers_skipped']} layers are as they were"]
        else:
            lines = [
                f"{self.model}: {totals['layers_converted']} layers converted, {totals['layers_skipped']} left alone"
            ]
            lines.append(self._share())
            for part, label in (("layer", "converted layers"), ("model", "whole model")):
                before, after, ratio = (totals[f"{part}_{key}"] for key in ("bytes_before", "bytes_after", "ratio"))
                lines.append(f"{label}: {size(before)} -> {size(after)} ({ratio:.3f}x)")
            if kept := totals["layer_bytes_kept"]:
                lines.append(
                    f"kept dequantised for speed: {size(kept)} more in memory once many rows have come, never saved; "
                    f"with that converted layers take {size(totals['layer_bytes_after'] + kept)}"
                )
            counts = Counter(layer.scheme for layer in self.converted)
            lines += [f"{scheme} ({_layers(count)})" for scheme, count in counts.items()]
            for which in ("output_error", "weight_error"):
                errors = {layer.name: _known(getattr(layer, which)) or 0.0 for layer in self.converted}
                worst = max(errors, key=lambda name: errors[name])
                if errors[worst]:
                    lines.append(
                        f"largest {which.replace('_', ' ')}: {100 * errors[worst]:.2f} %, {display_name(worst)}"
                    )
                    break
        if self.training:
            lines.append("in training mode: model.eval() comes before inference")
        if self.attention:
            lines.append(f"attention of {len(self.attention)} modules by tilewright::attention in inference on a CPU")
        lines += [f"{', '.join(names)}: {state}" for state, names in by_reason(self.programs).items()]
        lines += [self.cache] if self.cache else []
        lines += [self.timing] if self.timing else []
        return lines + self._origins()

    def _origins(self) -> list[str]:
        """From where the choices of implementations came, where it is not the same for all."""
        counts = {m: Counter(layer.origins[m] for layer in self.converted if m in layer.origins) for m in BATCHES}
        found: dict[str, list[int]] = {}
        for m, origins in counts.items():
            words = ", ".join(f"{origin} ({_layers(count)})" for origin, count in origins.items())
            found.setdefault(words, []).append(m)
        if {*counts[BATCHES[0]], *counts[BATCHES[1]]} <= {ORDER}:
            return []
        return [f"implementations at M={', '.join(map(str, batches))}: {words}" for words, batches in found.items()]

    def _share(self) -> str:
        """How much of the model was converted; if that is less than half, what the rest is."""
        whole, share = self.model_bytes_before, self.totals["converted_share"]
        if share >= 0.5:
            return f"{percent(share)} of the model's bytes were converted"
        rest = Counter({"layers left alone": sum(layer.bytes_before for layer in self.skipped)})
        for other in self.others:
            rest[other.what] += other.bytes
        most = [f"{percent(held / whole)} are {what}" for what, held in rest.most_common(3) if held >= 0.02 * whole]
        return f"less than half of the model's bytes were converted ({percent(share)}): {', '.join(most)}"

    def _columns(self, groups: list[ReportedGroup]) -> list[Column]:
        """The table of converted layers. What the headlines or another column say as well is left out first."""

        def known(which: str) -> bool:
            return any(getattr(layer, which) is not None for layer in self.converted)

        def times(which: str) -> list[str]:
            return ["-" if time is None else f"{time:.4g}" for time in (group.total(which) for group in groups)]

        # The headlines spell the options out. In the table they would only take room, unless two layers differ in them.
        names = Counter(scheme.partition(":")[0] for scheme in {layer.scheme for layer in self.converted})
        labels = [group.layers[0].scheme for group in groups]
        schemes = [name if names[name := label.partition(":")[0]] == 1 else label for label in labels]
        columns = [
            Column("layer", [group.pattern for group in groups], "name"),
            Column("", [f"x{len(group.layers)}" for group in groups], rank=1),
            Column("scheme", schemes, "words", rank=1 if len(set(schemes)) > 1 else 5),
        ]
        if all(len(group.layers) == 1 for group in groups):
            del columns[1]
        kernels: dict[tuple[str, ...], list[int]] = {}
        for m in BATCHES:
            kernels.setdefault(tuple(group.layers[0].implementations.get(m, "") for group in groups), []).append(m)
        for number, (cells, batches) in enumerate(kernels.items() if any(map(any, kernels)) else ()):
            columns.append(Column(f"M={', '.join(map(str, batches))}", list(cells), "words", rank=2 + 3 * number))
        for state, rank in (("before", 6), ("after", 1)):
            columns.append(Column(state, [size(group.total(f"bytes_{state}") or 0) for group in groups], rank=rank))
        if self.totals["layer_bytes_kept"]:
            columns.append(Column("kept", [size(group.total("bytes_kept") or 0) for group in groups], rank=1))
        has_output = known("output_error")
        columns.append(
            Column("weight err.", [group.errors("weight_error") for group in groups], rank=4 if has_output else 1)
        )
        if has_output:
            columns.append(Column("output err.", [group.errors("output_error") for group in groups], rank=1))
        if known("microseconds_after"):
            columns += [
                Column(f"us {state}", times(f"microseconds_{state}"), rank=rank)
                for state, rank in (("before", 5), ("after", 3))
            ]
        return columns

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
        said = by_reason({layer.name: layer.reason for layer in self.converted if layer.reason})
        notes += [f"{reason} ({listed(names, 2)})" for reason, names in said.items()]
        notes += [f"{display_name(name)} does not trace: {reason}" for name, reason in self.untraced.items()]
        return notes

    def _left_alone(self, every_layer: bool) -> list[tuple[str, str, list[str]]]:
        """(how many layers of how many bytes, the reason, their names or patterns of them)."""
        held = {display_name(layer.name): layer.bytes_after for layer in self.skipped}
        reasons = by_reason({layer.name: layer.reason for layer in self.skipped})
        return [
            (
                f"{_layers(len(names))}, {size(sum(held[name] for name in names))}",
                reason,
                self._shown(names, every_layer),
            )
            for reason, names in reasons.items()
        ]

    def _outside(self, every_layer: bool) -> list[tuple[str, str, list[str]]]:
        """The same of what lies outside of layers: what it is and how many bytes, the most first."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for other in self.others:
            found.setdefault((other.what, other.reason), {})[display_name(other.name)] = other.bytes
        return [
            (f"{what}, {size(sum(held.values()))}", reason, self._shown(list(held), every_layer))
            for (what, reason), held in sorted(found.items(), key=lambda item: -sum(item[1].values()))
        ]

    def _shown(self, names: list[str], each: bool) -> list[str]:
        """Names as a reader sees them, or patterns of them."""
        everything = [display_name(layer.name) for layer in self.layers]
        everything += [display_name(other.name) for other in self.others]
        patterns = {name: [name] for name in names} if each else name_patterns(names, everything)
        counts = {pattern: len(matched) for pattern, matched in patterns.items()}
        return [f"{name}\N{NO-BREAK SPACE}x{count}" if count > 1 else name for name, count in counts.items()]

    def to_markdown(self, every_layer: bool = False) -> str:
        """The totals, a table of the converted layers and a table of those left alone, with reasons."""
        parts = ["\n".join(f"- {line}" for line in self.headlines())]
        if self.converted:
            columns = self._columns(self.groups(every_layer))
            rows = [list(row) for row in zip(*(column.cells for column in columns), strict=True)]
            parts.append(_markdown([column.title or "layers" for column in columns], rows))
        if notes := self._notes():
            parts.append("\n".join(f"- {note}" for note in notes))
        left = self._left_alone(every_layer) + self._outside(every_layer)
        if left:
            rows = [[count, reason, ", ".join(names)] for count, reason, names in left]
            parts.append(_markdown(["left alone", "reason", "names"], rows))
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        """Text as wide as the terminal; in bold and dim if stdout is one."""
        return self._text(every_layer=False)

    def details(self) -> str:
        """The same with every layer in a row of its own."""
        return self._text(every_layer=True)

    def _text(self, every_layer: bool) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        bold, dim = ("\x1b[1m{}\x1b[0m", "\x1b[2m{}\x1b[0m") if sys.stdout.isatty() else ("{}", "{}")
        lines = [bold.format(part) for line in self.headlines() for part in wrapped(line, width, "  ")]
        if self.converted:
            table, dropped = fit(self._columns(self.groups(every_layer)), width)
            lines += ["", bold.format(table[0]), *table[1:]]
            if dropped:
                note = f"no room for {', '.join(filter(None, dropped))} in {width} columns"
                lines += [dim.format(part) for part in wrapped(note, width, "  ")]
        for title, held, left in (
            (f"left alone: {_layers(len(self.skipped))}, ", self.skipped, self._left_alone(every_layer)),
            ("outside of layers: ", self.others, self._outside(every_layer)),
        ):
            if left:
                lines += ["", bold.format(title + size(sum(map(_held, held))))]
            for count, reason, names in left:
                named = names if every_layer or len(names) < 6 else [*names[:5], f"{len(names) - 5} more"]
                lines += wrapped(f"{count}: {reason}", width, "  ")
                lines += [f"    {part}" for part in wrapped(", ".join(named), width - 4)]
        if notes := self._notes():
            lines += ["", *(dim.format(part) for note in notes for part in wrapped(note, width, "  "))]
        return "\n".join(lines)


def _held(part: ReportedLayer | ReportedOther) -> int:
    return part.bytes if isinstance(part, ReportedOther) else part.bytes_after


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _known(error: float | None) -> float | None:
    return None if error is None or math.isnan(error) else error


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
