"""Calibration of static int8: what reaches each convolution on sample inputs, and what quantising it costs there.

The model runs with its convolutions fused in float, region by region through ``torch.fx.Interpreter``, which sees every
tensor between layers. Convolutions are watched by hooks too, for those outside of any region, and for what the model is
called on that a graph was not made for: there its layers run one by one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import fx, nn

from tilewright.convert import calibrate
from tilewright.convert.calibrate import Observer
from tilewright.convert.graph import NotAsExpected, Region
from tilewright.convert.network.int8_flow import Flow, Scale
from tilewright.convert.network.match import Site
from tilewright.convert.network.means import MeanShift
from tilewright.convert.network.program import Program
from tilewright.convert.network.seen import SeenCall
from tilewright.convert.record import join
from tilewright.convert.text import display_name
from tilewright.nn import Int8ConvBnAct2d

#: How many images, or single samples of another kind, errors are measured on, if the calls of the model have no more
#: each.
MEASURED_IMAGES = 8


class Calibration:
    """Observers for every tensor that a convolution to be quantised reads.

    regions: with their sites; the programs of these regions must be in place. required: names of the layers to
    quantise, in the model. memory: what may be held of the regions' inputs; those of one call are held in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: list[tuple[Region, list[Site]]],
        required: set[str],
        memory: calibrate.Memory | None = None,
    ):
        self.model = model
        self.regions = regions
        self.required = required
        self._memory = calibrate.Memory() if memory is None else memory
        self._grids: dict[Any, tuple[float, int | None]] = {}
        #: What regions are called on, by their names, and what was seen in each of these calls.
        self._inputs: dict[str, list[tuple[Any, ...]]] = {}
        self._seen: dict[str, list[SeenCall]] = {}
        self._now: SeenCall | None = None
        self._calls = {site.call: join(region.name, site.name) for region, sites in regions for site in sites}
        self._calls = {call: layer for call, layer in self._calls.items() if layer in required}
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

        with calibrate.listening(called, hear), self._interpreted(self._observe_call):
            yield

    @contextlib.contextmanager
    def _interpreted(self, run: Callable[[Region, tuple[Any, ...]], Any]) -> Iterator[None]:
        """While this is open, ``run`` runs the graphs of regions on what they are called on."""
        forwards = [(region, vars(region.module).get("forward")) for region, _ in self.regions]
        programs = {program: region for region, program in forwards if isinstance(program, Program)}
        for program, region in programs.items():
            program.observer = functools.partial(run, region)
        try:
            yield
        finally:
            for program in programs:
                program.observer = None

    def _observe_call(self, region: Region, given: tuple[Any, ...]) -> Any:
        """Observe a call, whose inputs are kept until there are enough images or memory is short, and as long as there
        is room for it what it shows of the layers.
        """
        kept, seen = self._inputs.setdefault(region.name, []), self._seen.setdefault(region.name, [])
        added = sum(map(_images, kept)) < MEASURED_IMAGES and self._keep(kept, given)
        outer, self._now = self._now, SeenCall(self._memory) if added else None
        if self._now is not None:
            seen.append(self._now)
        try:
            return region.interpret(self._observe, given)
        except NotAsExpected:
            if added:
                self._memory.drop(kept)
                seen.pop().release()
            raise
        finally:
            self._now = outer

    def _keep(self, kept: list[tuple[Any, ...]], given: tuple[Any, ...]) -> bool:
        """Keep the inputs of a call: they come before what calls show, which a further run shows again."""
        if self._memory.keep(kept, given):
            return True
        for each in itertools.chain.from_iterable(self._seen.values()):
            each.release()
        return self._memory.keep(kept, given)

    def _observe(self, node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
        for observer, layer in self._by_node.get(node, ()):
            _add(observer, value, layer)
        if self._now is not None and node in self._calls:
            self._now.add(self._calls[node], given[1:], value)

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
            key = (seen, observer, percentile, symmetric)  # one observer may serve several layers
            if key not in self._grids:
                self._grids[key] = (
                    (seen.scale(observer, percentile), None) if symmetric else seen.grid(observer, percentile)
                )
            found[f"{name}_scale"], zero_point = self._grids[key]
            if zero_point is not None:
                found[f"{name}_zero_point"] = zero_point
        return found

    def calls_to_measure(self, names: Container[str]) -> int:
        """How many calls of the layers ``names`` the kept inputs make."""
        found = 0
        for region, sites in self.regions:
            concerned = sum(join(region.name, site.name) in names for site in sites)
            found += concerned * len(self._inputs.get(region.name, []))
        return found

    def measure(
        self, candidates: dict[str, Int8ConvBnAct2d], advance: Callable[[], None] = lambda: None
    ) -> dict[str, float | None]:
        """Take from each int8 layer in ``candidates`` what it errs by on average, channel by channel, and return its
        relative output error, both on what reaches it in the float model on the first sample inputs.

        Rounding a weight shifts the mean of a channel wherever the mean of its inputs is not zero, as after a ReLU
        (Nagel et al. 2019, section 4.2). The mean is that of the result before the activation. For the error, input and
        residual of a layer are quantised, its output is not. Of several calls the worst counts, each measured with what
        was taken off by then. advance: is called after each of the ``calls_to_measure``.
        """
        shifts = {name: MeanShift(self.model.get_submodule(name), layer) for name, layer in candidates.items()}
        found: dict[str, float | None] = {}

        def at_site(name: str, given: tuple[Any, ...], value: torch.Tensor) -> None:
            if name not in candidates:
                return
            x, residual, activation, slope, padding = given
            layer = candidates[name]
            q = _quantized(x, layer.x_scale, layer.x_zero)
            shifts[name].add(x, q, padding)
            if residual is not None and getattr(layer, "residual_scale", None) is not None:
                residual = _quantized(residual, layer.r_scale, layer.r_zero)
            error = calibrate.relative_error(layer.run(q, residual, activation, slope, padding), value)
            worst = found.get(name, 0.0)
            found[name] = None if error is None or worst is None else max(error, worst)
            advance()

        with calibrate.evaluation(self.model), self._interpreted(_run_unwatched):
            for region, sites in self.regions:
                if any(join(region.name, site.name) in candidates for site in sites):
                    self._show_calls(region, at_site)
        return found

    def _show_calls(self, region: Region, show: Callable[..., None]) -> None:
        """What layers were given and returned in the calls of ``region`` that are kept, a last time."""

        def watch(node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
            if node in self._calls:
                show(self._calls[node], given[1:], value)

        for given, seen in zip(self._inputs.pop(region.name, []), self._seen.pop(region.name, []), strict=True):
            if seen.intact():
                for shown in seen.shown():
                    show(*shown)
            else:
                seen.release()
                region.interpret(watch, given)


def _run_unwatched(region: Region, given: tuple[Any, ...]) -> Any:
    return region.interpret(lambda node, arguments, value: None, given)


def _quantized(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    return torch.ops.tilewright.quantize_per_tensor(x, scale, None, zero_point)


def _add(observer: Observer, value: Any, layer: str) -> None:
    if not isinstance(value, torch.Tensor):
        return
    try:
        observer.add(value)
    except ValueError as error:
        raise ValueError(f"calibration data brings {error} into the layer {display_name(layer)!r}") from None


def _images(given: tuple[Any, ...]) -> int:
    """How many samples a region is called on at once."""
    return max((len(x) for x in given if isinstance(x, torch.Tensor) and x.dim() > 1), default=1)
