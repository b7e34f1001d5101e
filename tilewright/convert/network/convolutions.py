"""Converts the convolutions of a model: folds and fuses in float, quantises what calibration data reached, and gives
the model programs. Each region is traced once; its graph is rewritten as its layers are replaced.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import nn

from tilewright.convert import calibrate, structure
from tilewright.convert.code import names_in_code_of
from tilewright.convert.conversion import Conversion, Job, register_conversion
from tilewright.convert.graph import Region, find_regions, has_hooks
from tilewright.convert.network.calibration import Calibration
from tilewright.convert.network.int8_flow import Flow
from tilewright.convert.network.int8_writing import write_int8
from tilewright.convert.network.match import Site, call_counts, find_folds, rewrite
from tilewright.convert.network.program import Program, Watched, remove_programs
from tilewright.convert.plan import Planned
from tilewright.convert.progress import phase, track
from tilewright.convert.record import LayerRecord, join
from tilewright.convert.schemes.convolution import Fuse, Int8Static
from tilewright.convert.text import display_name, listed
from tilewright.nn import ConvLayer, FoldedBatchNorm, Int8ConvBnAct2d

logger = logging.getLogger("tilewright")

ON_VECTORS = "it works on a pooled image of one pixel, where int8 gains nothing: fused in float"
NEEDS_DATA = "static int8 needs calibration_data: fused in float"
#: A region whose graph is rewritten, and the calls of convolutions in it.
Rewritten = tuple[Region, list[Site]]


@register_conversion("convolutions")
class Convolutions(Conversion):
    """Fuses in float what follows each convolution (``prepare``), then quantises (``replace``)."""

    whole_model = True

    def __init__(self, job: Job, planned: dict[str, Planned]):
        super().__init__(job, planned)
        #: Convolutions of an earlier conversion need their programs anew.
        self.concerned = bool(planned) or any(isinstance(module, ConvLayer) for module in job.model.modules())
        self.records: dict[str, LayerRecord] = {}
        self.regions: list[Rewritten] | None = None
        self.untraced: dict[str, str] = {}
        self.calibration: Calibration | None = None

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Raise ValueError if a batch-norm is in training mode."""
        norms = {
            name: each for name, each in model.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)
        }
        if names := [display_name(name) for name, norm in norms.items() if norm.training]:
            raise ValueError(
                f"batch-norm is in training mode ({listed(names, 3)}): "
                "call model.eval() before converting, as its statistics become part of the convolutions"
            )

    # ---- first: in float
    def prepare(self, sample: Any) -> None:
        """Fold batch-norms, put fused layers in place, and find what follows each.

        sample: says how the parts of the model are called; None if there is no data.
        """
        if not self.planned:
            return
        model = self.job.model
        remove_programs(model)
        parts = frozenset(map(model.get_submodule, self.job.plan.convert))
        regions, self.untraced = _regions_as_called(model, sample, parts)
        folds, reasons = self._folds(regions)
        for name in track(list(self.planned), "Fusing", self.job.progress, self.job.rest):
            self._fuse_layer(name, folds, reasons)
        self.regions = [(region, rewrite(region)) for region in map(_see_through_norms, regions)]
        required = {name for name, planned in self.planned.items() if isinstance(planned.scheme, Int8Static)}
        for name in self._on_vectors(required):
            required.discard(name)
            self.records[name].note = ON_VECTORS
        if required and self.job.with_data:
            for region, sites in self.regions:
                if sites:
                    vars(region.module)["forward"] = Watched(region)
            self.calibration = Calibration(self.job.model, self.regions, required, self.job.memory)
        elif required:
            logger.warning("%d convolutions are fused in float: static int8 needs calibration_data", len(required))

    def _folds(self, regions: list[Region]) -> tuple[dict[nn.Module, nn.Module], dict[nn.Module, str]]:
        counts, names = call_counts(regions), structure.names_of_modules(self.job.model)
        folds: dict[nn.Module, nn.Module] = {}
        reasons: dict[nn.Module, str] = {}
        for region in regions:
            prefix = f"{region.name}." if region.name else ""
            outside = {id(m) for m, all_names in names.items() if not all(n.startswith(prefix) for n in all_names)}
            for conv, norm in find_folds(region, counts, outside, self._reads_weights_in(region)).items():
                if isinstance(norm, str):
                    reasons[conv] = f"batch-norm left apart: {norm}"
                else:
                    folds[conv] = norm
        return folds, reasons

    def _reads_weights_in(self, region: Region) -> str | None:
        """A module around ``region`` whose code is in no graph and names weights."""
        for name in self.untraced:
            around = region.name != name and (not name or region.name.startswith(f"{name}."))
            kind = type(self.job.model.get_submodule(name))
            if around and names_in_code_of(kind) & {"weight", "bias", "parameters", "named_parameters", "state_dict"}:
                return kind.__name__
        return None

    def _fuse_layer(self, name: str, folds: dict[nn.Module, nn.Module], reasons: dict[nn.Module, str]) -> None:
        old, scheme = self.job.model.get_submodule(name), self.planned[name].scheme
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
        self.job.replace(name, old, new)
        if norm is not None:
            self.job.places.replace(norm, folded(norm, name))
        if static and not self.job.with_data:
            note = f"{NEEDS_DATA}; {note}" if note else NEEDS_DATA
        after = structure.tensor_bytes(new)
        self.records[name] = LayerRecord(float_scheme.to_json(), str(float_scheme), before, after, note=note)

    def _on_vectors(self, required: set[str]) -> list[str]:
        found = []
        for region, sites in self.regions or ():
            names = {site.name for site in sites if join(region.name, site.name) in required}
            flow = Flow(region.graph, region.modules(), sites, names)
            found += [join(region.name, name) for name in flow.on_vectors()]
        return found

    # ---- second: int8
    def observing(self) -> contextlib.AbstractContextManager[object]:
        """While this is open, the tensors that layers to be quantised read are observed."""
        return contextlib.nullcontext() if self.calibration is None else self.calibration.watching()

    def replace(self, samples: list[Any]) -> None:
        """Replace the fused layers by int8 ones, but for those that no data reached or that err too much."""
        calibration, self.calibration = self.calibration, None
        if calibration is None:
            return
        made: dict[str, Int8ConvBnAct2d] = {}
        for name in track(list(self.planned), "Quantising", self.job.progress, self.job.rest):
            scheme = self.planned[name].scheme
            if name not in calibration.required or not isinstance(scheme, Int8Static):
                continue
            if not calibration.reached(name):
                self.records[name].note = "the calibration data did not reach it: fused in float"
                continue
            scales = calibration.scales(name, scheme.observer, scheme.percentile, scheme.symmetric)
            made[name] = scheme.build(self.job.model.get_submodule(name), **scales)  # type: ignore[assignment]
        count = calibration.calls_to_measure(made)
        with phase("Measuring", count, self.job.progress, self.job.rest) as advance:
            errors = calibration.measure(made, advance)
        for name, new in made.items():
            self._quantize_layer(name, new, errors.get(name))

    def _quantize_layer(self, name: str, new: ConvLayer, error: float | None) -> None:
        old, scheme, record = self.job.model.get_submodule(name), self.planned[name].scheme, self.records[name]
        limit = scheme.max_error if isinstance(scheme, Int8Static) else None
        if limit is not None and error is not None and error > limit:
            record.note = f"kept in float: its output error of {error:.1%} exceeds max_error={limit:.1%}"
            return
        record.scheme, record.label = scheme.to_json(), str(scheme)
        record.weight_error, record.output_error = scheme.weight_error(old, new), error
        record.bytes_after = structure.tensor_bytes(new)
        self.job.replace(name, old, new)

    # ---- last
    def finish(self) -> None:
        """Give the model, which is in its last form, programs, and write down what became of each layer."""
        if not self.concerned:
            return
        record = self.job.record
        record.untraced |= self.untraced
        prefixes = [f"{region.name}." if region.name else "" for region, _ in self.regions or ()]
        if any(name.startswith(prefix) for name in record.attention for prefix in prefixes):
            self.regions = None  # what was traced calls another attention now
        sites = install_programs(self.job.model, record.untraced, self.regions)
        for name, made in self.records.items():
            made.label += "".join(f" + {each}" for each in sites.get(name, ()))
            record.layers[name] = made


def folded(norm: nn.Module, source: str) -> FoldedBatchNorm:
    """What takes the place of a batch-norm that the convolution called ``source`` holds."""
    then = getattr(norm, "act", None)
    channels = int(norm.running_mean.numel())  # type: ignore[operator]
    images = isinstance(norm, nn.BatchNorm2d)
    return FoldedBatchNorm(channels, source, then if isinstance(then, nn.Module) else None, images).train(norm.training)


def _see_through_norms(region: Region) -> Region:
    """``region`` with the activations that were part of batch-norms which are folded now as calls of their own."""
    modules = region.modules()
    for node in list(region.calls()):
        module = modules[str(node.target)]
        if isinstance(module, FoldedBatchNorm) and module.then is not None:
            region.open_call(node, f"{node.target}.then")
    return region


def _regions_as_called(
    model: nn.Module, sample: Any, parts: frozenset[nn.Module]
) -> tuple[list[Region], dict[str, str]]:
    """``find_regions``, with a region that the model calls otherwise on ``sample`` taken apart.

    An encoder-decoder traces with the first of its inputs alone, and nobody calls it so; its encoder is another matter.
    """
    regions, untraced = find_regions(model, parts=parts)
    while sample is not None and (refused := _called_otherwise(model, regions, sample)):
        regions, untraced = find_regions(model, untraced | refused, parts, known=regions)
    return regions, untraced


def _called_otherwise(model: nn.Module, regions: list[Region], sample: Any) -> dict[str, str]:
    """The regions whose calls on ``sample`` all ask for something else than their graphs do: name -> reason."""
    by_name = {region.name: region for region in regions}
    reasons: dict[str, list[str | None]] = {}

    def hear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reasons.setdefault(name, []).append(by_name[name].why_not_called_so(args, kwargs))

    if list(by_name) == [""] and not model._forward_pre_hooks and _is_images(model, sample):
        hear("", *calibrate.arguments(sample))  # which nobody has to run the model for
    else:
        with calibrate.listening({name: region.module for name, region in by_name.items()}, hear):
            calibrate.run(model, [sample])
    return {name: said[0] for name, said in reasons.items() if said[0] is not None and None not in said}


def _is_images(model: nn.Module, sample: Any) -> bool:
    """Whether a model of images is called on batches of them, in its own dtype, and nothing else. Where it is called on
    what it does not take, the model as it was says so best.
    """
    if isinstance(sample, calibrate.Sample):
        return False
    args, kwargs = calibrate.arguments(sample)
    own = {(x.dtype, x.device) for x in model.parameters()}
    given = (*args, *kwargs.values())
    return all(isinstance(x, torch.Tensor) and x.dim() == 4 and {(x.dtype, x.device)} == own for x in given)


def install_programs(
    model: nn.Module, untraced: dict[str, str], regions: list[Rewritten] | None = None
) -> dict[str, tuple[str, ...]]:
    """Give every region of ``model`` with fused convolutions its program. Returns what each of them takes over.

    untraced: modules that are known not to trace, name -> reason; what else does not is added. regions: if they are
    known already.
    """
    remove_programs(model)
    if regions is None:
        found, reasons = find_regions(model, untraced)
        untraced |= reasons
        regions = [(region, rewrite(region)) for region in found]
    for region, sites in regions:
        if sites:
            steps = write_int8(region.graph, region.modules(), sites)
            vars(region.module)["forward"] = Program(region, steps)
    return {join(region.name, site.name): site.epilogue for region, sites in regions for site in sites}
