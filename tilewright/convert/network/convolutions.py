"""Converts the convolutions of a model: folds, fuses, and quantises what there is calibration data for.

``Convolutions`` goes in three steps, between which the converter does its own: ``fuse`` (in float), ``quantize`` (after
the calibration data went through the model) and ``install`` (programs for the model as it is in the end).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tilewright.convert import calibrate, layers, structure
from tilewright.convert.graph.tracing import Region, find_regions, has_hooks, is_norm
from tilewright.convert.network.calibration import Calibration
from tilewright.convert.network.int8_flow import Flow, write_int8
from tilewright.convert.network.match import Site, call_counts, find_folds, rewrite
from tilewright.convert.network.program import Program, remove_programs
from tilewright.convert.plan import Plan, Planned
from tilewright.convert.progress import track
from tilewright.convert.record import LayerRecord, Record, join
from tilewright.convert.schemes.convolution import ConvScheme, Fuse, Int8Static
from tilewright.convert.text import display_name, listed
from tilewright.nn import ConvLayer, FoldedBatchNorm

logger = logging.getLogger("tilewright")

NEEDS_DATA = "static int8 needs calibration_data: fused in float"


def check_mode(model: nn.Module, planned: Mapping[str, Planned]) -> None:
    """Raise ValueError if convolutions are to be converted while a batch-norm is in training mode."""
    if not any(isinstance(each.scheme, ConvScheme) for each in planned.values()):
        return
    names = [name for name, module in model.named_modules() if is_norm(module) and _trains(module)]
    if names:
        raise ValueError(
            f"batch-norm is in training mode ({listed([display_name(name) for name in names], 3)}): "
            "call model.eval() before converting, as its statistics become part of the convolutions"
        )


def _trains(norm: nn.Module) -> bool:
    return norm.training and isinstance(norm, nn.modules.batchnorm._BatchNorm)


class Convolutions:
    """The convolutions of ``model`` that a plan converts.

    planned: these, by name. fused_already: whether the model has fused ones from an earlier conversion.
    """

    def __init__(self, model: nn.Module, plan: Plan, fused_already: bool = False):
        self.model = model
        self.planned = {name: each for name, each in plan.convert.items() if isinstance(each.scheme, ConvScheme)}
        self.concerned = bool(self.planned) or fused_already
        self.slots: structure.Slots = structure.slots_of(model) if self.planned else {}
        self.records: dict[str, LayerRecord] = {}
        self.regions: list[tuple[Region, list[Site]]] = []
        self.untraced: dict[str, str] = {}
        self.calibration: Calibration | None = None

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        places = list(self.slots.get(old, ()))
        self.model = structure.replace(self.model, old, new, self.slots)
        self.slots[new] = places

    # ---- first: in float
    def fuse(self, sample: Any, progress: bool | None) -> nn.Module:
        """Fold batch-norms, put fused layers in place, and find what follows each. Returns the root.

        sample: a sample input of the model, which says how its parts are called; None if there is no data.
        """
        if not self.planned:
            return self.model
        with_data = sample is not None
        remove_programs(self.model)
        regions, self.untraced = _regions_as_called(self.model, sample)
        folds, reasons = self._folds(regions)
        for name in track(self.planned, "Fusing", progress):
            self._fuse_layer(name, folds, reasons, with_data)
        self._write_regions()
        required = {name for name, planned in self.planned.items() if isinstance(planned.scheme, Int8Static)}
        for name in self._on_vectors(required):
            required.discard(name)
            self.records[
                name
            ].note = "it works on a pooled image of one pixel, where int8 gains nothing: fused in float"
        if required and with_data:
            self.calibration = Calibration(self.model, self.regions, required)
        elif required:
            logger.warning("%d convolutions are fused in float: static int8 needs calibration_data", len(required))
        return self.model

    def _folds(self, regions: list[Region]) -> tuple[dict[nn.Module, nn.Module], dict[nn.Module, str]]:
        counts, names = call_counts(regions), structure.names_of_modules(self.model)
        folds: dict[nn.Module, nn.Module] = {}
        reasons: dict[nn.Module, str] = {}
        for region in regions:
            prefix = f"{region.name}." if region.name else ""
            outside = {id(m) for m, all_names in names.items() if not all(n.startswith(prefix) for n in all_names)}
            for conv, norm in find_folds(region, counts, outside).items():
                if isinstance(norm, str):
                    reasons[conv] = f"batch-norm left apart: {norm}"
                else:
                    folds[conv] = norm
        return folds, reasons

    def _fuse_layer(
        self, name: str, folds: dict[nn.Module, nn.Module], reasons: dict[nn.Module, str], with_data: bool
    ) -> None:
        old, scheme = self.model.get_submodule(name), self.planned[name].scheme
        static = isinstance(scheme, Int8Static)
        float_scheme = Fuse() if static else scheme
        norm, note = folds.get(old), reasons.get(old, "")
        if norm is None and not note and has_hooks(old):
            note = "a hook watches it: nothing is fused into it"
        with torch.no_grad():
            try:
                new = float_scheme.build(old, norm=norm)
            except ValueError as error:
                note, norm = f"batch-norm left apart: {error}", None
                new = float_scheme.build(old)
        before = structure.tensor_bytes(old) + (structure.tensor_bytes(norm) if norm is not None else 0)
        layers.carry_over(old, new, bias=False)
        new.layer_name = name  # type: ignore[assignment]
        self._replace(old, new)
        if norm is not None:
            then = getattr(norm, "act", None)
            channels = int(norm.running_mean.numel())  # type: ignore[operator]
            folded = FoldedBatchNorm(channels, name, then if isinstance(then, nn.Module) else None)
            self._replace(norm, folded.train(norm.training))
        if static and not with_data:
            note = f"{NEEDS_DATA}; {note}" if note else NEEDS_DATA
        self.records[name] = LayerRecord(
            float_scheme.to_json(), str(float_scheme), before, structure.tensor_bytes(new), note=note
        )

    def _write_regions(self) -> None:
        # Traced once more: what stands in place of a batch-norm may call an activation that was part of it.
        regions, _ = find_regions(self.model, self.untraced)
        self.regions = [(region, rewrite(region)) for region in regions]
        for region, sites in self.regions:
            if sites:
                vars(region.module)["forward"] = Program(region.module, region.graph, region.inputs, region.defaults)

    def _on_vectors(self, required: set[str]) -> list[str]:
        found = []
        for region, sites in self.regions:
            names = {site.name for site in sites if join(region.name, site.name) in required}
            flow = Flow(region.graph, region.modules(), sites, names)
            found += [join(region.name, name) for name in flow.on_vectors()]
        return found

    # ---- second: int8
    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, the tensors that layers to be quantised read are observed."""
        with self.calibration.watching() if self.calibration is not None else contextlib.nullcontext():
            yield

    def quantize(self, samples: list[Any], call: Callable[[nn.Module, Any], Any], progress: bool | None) -> None:
        """Replace the fused layers by int8 ones, but for those that no data reached or that err too much."""
        if self.calibration is None:
            return
        made: dict[str, ConvLayer] = {}
        for name in track(self.planned, "Quantising", progress):
            scheme = self.planned[name].scheme
            if name not in self.calibration.required or not isinstance(scheme, Int8Static):
                continue
            if not self.calibration.reached(name):
                self.records[name].note = "the calibration data did not reach it: fused in float"
                continue
            scales = self.calibration.scales(name, scheme.observer, scheme.percentile)
            made[name] = scheme.build(self.model.get_submodule(name), **scales)  # type: ignore[assignment]
        with torch.no_grad():
            self.calibration.correct_biases(made, samples, call)
            errors = self.calibration.errors(made, samples, call)
        for name, new in made.items():
            self._quantize_layer(name, new, errors.get(name))

    def _quantize_layer(self, name: str, new: ConvLayer, error: float | None) -> None:
        old, scheme, record = self.model.get_submodule(name), self.planned[name].scheme, self.records[name]
        limit = scheme.max_error if isinstance(scheme, Int8Static) else None
        if limit is not None and error is not None and error > limit:
            record.note = f"kept in float: its output error of {error:.1%} exceeds max_error={limit:.1%}"
            return
        record.scheme, record.label = scheme.to_json(), str(scheme)
        record.weight_error, record.output_error = scheme.weight_error(old, new), error
        record.bytes_after = structure.tensor_bytes(new)
        layers.carry_over(old, new, bias=False)
        new.layer_name = name
        self._replace(old, new)

    def release(self) -> None:
        """Keep hold of no module any more, so that each float layer can be freed when its replacement exists."""
        self.slots, self.regions, self.calibration = {}, [], None

    # ---- last
    def install(self, model: nn.Module, record: Record) -> None:
        """Give ``model``, which is this one in its last form, programs, and write down what became of each layer."""
        if not self.concerned:
            return
        record.untraced |= self.untraced
        sites = install_programs(model, record.untraced)
        for name, made in self.records.items():
            made.label += "".join(f" + {each}" for each in sites.get(name, ()))
            record.layers[name] = made


def _regions_as_called(model: nn.Module, sample: Any) -> tuple[list[Region], dict[str, str]]:
    """``find_regions``, with a region that the model calls otherwise on ``sample`` taken apart.

    An encoder-decoder traces with the first of its inputs alone, and nobody calls it so; its encoder is another matter.
    """
    regions, untraced = find_regions(model)
    while sample is not None and (refused := _called_otherwise(model, regions, sample)):
        regions, untraced = find_regions(model, untraced | refused)
    return regions, untraced


def _called_otherwise(model: nn.Module, regions: list[Region], sample: Any) -> dict[str, str]:
    """The regions whose calls on ``sample`` all ask for something else than their graphs do: name -> reason."""
    reasons: dict[str, list[str | None]] = {}

    def watch(region: Region) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reasons.setdefault(region.name, []).append(region.why_not_called_so(args, kwargs))

        return hook

    handles = [each.module.register_forward_pre_hook(watch(each), with_kwargs=True) for each in regions]
    try:
        with calibrate.evaluation(model):
            calibrate.call(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return {name: said[0] for name, said in reasons.items() if said[0] is not None and None not in said}


def install_programs(model: nn.Module, untraced: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Give every region of ``model`` with fused convolutions its program. Returns what each of them takes over.

    untraced: modules that are known not to trace, name -> reason; what else does not is added.
    """
    remove_programs(model)
    regions, reasons = find_regions(model, untraced)
    untraced |= reasons
    epilogues: dict[str, tuple[str, ...]] = {}
    for region in regions:
        sites = rewrite(region)
        if not sites:
            continue
        write_int8(region.graph, region.modules(), sites)
        vars(region.module)["forward"] = Program(region.module, region.graph, region.inputs, region.defaults)
        for site in sites:
            epilogues[join(region.name, site.name)] = site.epilogue
    return epilogues
