"""Calibration of static int8: what reaches each convolution on sample inputs, and what quantising it costs there.

The model runs with its convolutions fused in float, region by region through ``torch.fx.Interpreter``, which sees every
tensor between layers. Convolutions are watched by hooks too, for those outside of any region, and for what the model is
called on that a graph was not made for: there its layers run one by one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from tilewright.convert import calibrate
from tilewright.convert.calibrate import Observer
from tilewright.convert.graph import Region, Watch
from tilewright.convert.network.int8_flow import Flow, Scale
from tilewright.convert.network.match import Site
from tilewright.convert.network.program import Program
from tilewright.convert.record import join
from tilewright.convert.text import display_name
from tilewright.nn import ConvLayer


class Calibration:
    """Observers for every tensor that a convolution to be quantised reads.

    regions: with their sites; the programs of these regions must be in place. required: names of the layers to
    quantise, in the model.
    """

    def __init__(self, model: nn.Module, regions: list[tuple[Region, list[Site]]], required: set[str]):
        self.model = model
        self.regions = regions
        self.required = required
        self.observers: dict[Scale, Observer] = {}
        self._by_node: dict[fx.Node, list[tuple[Observer, str]]] = {}
        inside: set[str] = set()
        for region, sites in regions:
            modules = region.modules()
            names = {site.name for site in sites if join(region.name, site.name) in required}
            inside |= {join(region.name, name) for name in names}
            flow = Flow(region.graph, modules, sites, names)
            shared: dict[fx.Node, Observer] = {}
            for node, port in flow.ports():
                observer = shared.setdefault(flow.leader(node), Observer())
                layer = join(region.name, port.layer)
                self.observers[Scale(layer, port.port)] = observer
                watched = self._by_node.setdefault(node, [])
                if not any(known is observer for known, _ in watched):
                    watched.append((observer, layer))
        for layer in sorted(required - inside):
            self.observers[Scale(layer, "x")] = Observer()

    # ---- running
    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, whatever the model is called on is observed."""
        called = {layer: self.model.get_submodule(layer) for layer in sorted(self.required)}

        def hear(layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _add(self.observers[Scale(layer, "x")], calibrate.first_input(args, kwargs), layer)

        with calibrate.listening(called, hear), self._interpreted(self._observe):
            yield

    @contextlib.contextmanager
    def _interpreted(self, watch: Watch) -> Iterator[None]:
        forwards = [(region, vars(region.module).get("forward")) for region, _ in self.regions]
        programs = {program: region for region, program in forwards if isinstance(program, Program)}
        for program, region in programs.items():
            program.observer = functools.partial(region.interpret, watch)
        try:
            yield
        finally:
            for program in programs:
                program.observer = None

    def _observe(self, node: fx.Node, value: Any) -> None:
        for observer, layer in self._by_node.get(node, ()):
            _add(observer, value, layer)

    # ---- results
    def reached(self, layer: str) -> bool:
        """Whether any value came to a layer."""
        return self.observers[Scale(layer, "x")].seen > 0

    def scales(self, layer: str, observer: str, percentile: float, symmetric: bool) -> dict[str, Any]:
        """Keyword arguments of ``Int8ConvBnAct2d.from_float``."""
        found: dict[str, Any] = {}
        for port, name in (("x", "input"), ("r", "residual")):
            seen = self.observers.get(Scale(layer, port))
            if seen is None or not seen.seen:
                continue
            if symmetric:
                found[f"{name}_scale"] = seen.scale(observer, percentile)
            else:
                found[f"{name}_scale"], found[f"{name}_zero_point"] = seen.grid(observer, percentile)
        return found

    def errors(self, candidates: dict[str, ConvLayer], samples: Iterable[Any]) -> dict[str, float | None]:
        """Relative output error of each int8 layer in ``candidates`` on what reaches it in the float model.

        Its input and residual are quantised, its output is not. A layer that is called more than once has its worst.
        """
        found: dict[str, float | None] = {}

        def measure(name: str, given: tuple[Any, ...], value: torch.Tensor) -> None:
            error = calibrate.relative_error(_quantized_run(candidates[name], given), value)
            worst = found.get(name, 0.0)
            found[name] = None if error is None or worst is None else max(error, worst)

        self._at_sites(candidates, samples, measure)
        return found

    def correct_biases(self, candidates: dict[str, ConvLayer], samples: Iterable[Any]) -> None:
        """Take from each int8 layer in ``candidates`` what it errs by on average, channel by channel.

        Rounding a weight shifts the mean of a channel wherever the mean of its inputs is not zero, as after a ReLU
        (Nagel et al. 2019, section 4.2). The mean is that of the result before the activation.
        """
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}

        def measure(name: str, given: tuple[Any, ...], value: torch.Tensor) -> None:
            x, _, _, slope, padding = given
            plain = (x, None, "none", slope, padding)
            difference = self.model.get_submodule(name).run(*plain) - _quantized_run(candidates[name], plain)  # type: ignore[operator]
            difference = difference.to(torch.float64).transpose(0, 1).flatten(1)
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + difference.sum(1).cpu()
            counts[name] = counts.get(name, 0) + difference.shape[1]

        self._at_sites(candidates, samples, measure)
        for name, total in sums.items():
            layer = candidates[name]
            if not counts[name] or not torch.isfinite(total).all():
                continue
            layer.correct_bias((total / counts[name]).to(layer.device, torch.float32))

    def _at_sites(
        self,
        candidates: dict[str, ConvLayer],
        samples: Iterable[Any],
        measure: Callable[[str, tuple[Any, ...], torch.Tensor], None],
    ) -> None:
        """Run the float model and call ``measure`` for each call of a layer: its name, arguments and result."""
        named = [(site.call, join(region.name, site.name)) for region, sites in self.regions for site in sites]
        layers = {call: name for call, name in named if name in candidates}
        values: dict[fx.Node, Any] = {}

        def watch(node: fx.Node, value: Any) -> None:
            values[node] = value
            if node in layers:
                measure(layers[node], fx.map_arg(node.args[1:], values.__getitem__), value)

        def one_by_one() -> Iterator[Any]:
            for sample in samples:
                values.clear()
                yield sample

        with self._interpreted(watch):
            calibrate.run(self.model, one_by_one())


def _quantized_run(layer: ConvLayer, given: tuple[Any, ...]) -> torch.Tensor:
    x, residual, *rest = given
    if residual is not None and getattr(layer, "residual_scale", None) is not None:
        residual = torch.ops.tilewright.quantize_per_tensor(residual, layer.r_scale, None, layer.r_zero)
    return layer.run(x, residual, *rest)


def _add(observer: Observer, value: Any, layer: str) -> None:
    if not isinstance(value, torch.Tensor):
        return
    try:
        observer.add(value)
    except ValueError as error:
        raise ValueError(f"calibration data brings {error} into the layer {display_name(layer)!r}") from None
