"""What every architecture must keep when it is converted: one function for each promise."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import tilewright as tw

#: What further parts of an answer may have less than the first, in dB: many are sums of few numbers.
SLACK = 10.0
#: What an answer may have less where an error of a few bits may choose another expert, in dB.
JUMP = 13.0

Make = Callable[[], nn.Module]
Call = Callable[[nn.Module], Any]


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass(frozen=True)
class Recipe:
    """recipe, calibrated: how a model is converted. floor: signal over error in dB that an answer must have.

    weights_alone: the activations stay in float, so that the answer is that of the float model with the weights that
    the layers stand for. exact: so are the weights.
    """

    recipe: str
    floor: float
    calibrated: bool = False
    weights_alone: bool = False
    exact: bool = False


RECIPES = {
    "int8": Recipe("int8", 28),
    "int8-calibrated": Recipe("int8", 26, calibrated=True),
    "int8-weight-only": Recipe("int8-weight-only", 31, weights_alone=True),
    "int4": Recipe("int4-g32", 9, weights_alone=True),
    "w4a8": Recipe("w4a8-g32", 9),
    "fuse": Recipe("fuse", 70, weights_alone=True, exact=True),
}


CACHES = {"past_key_values", "cache_params", "state", "mems"}


def tensors(tree: Any) -> list[torch.Tensor]:
    """The floating tensors of an answer, in order; caches are none of it."""
    if hasattr(tree, "to_tuple"):
        tree = {name: value for name, value in tree.items() if name not in CACHES}
    found = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in found if leaf.is_floating_point()]


def decibels(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal over error."""
    value, reference = value.double(), reference.double()
    if value.shape != reference.shape:
        raise Broken(f"shape {tuple(value.shape)} instead of {tuple(reference.shape)}")
    if not torch.isfinite(value).all():
        return -math.inf if torch.isfinite(reference).all() else math.inf
    noise = (value - reference).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(max(reference.square().sum().item(), 1e-300) / noise)


def close(value: Any, reference: Any, floor: float, what: str) -> float:
    found = decibels(value, reference)
    if not found >= floor:
        raise Broken(f"{what}: {found:.1f} dB, less than {floor:g}")
    return found


def same(value: Any, reference: Any, what: str) -> None:
    value, reference = tensors(value), tensors(reference)
    if len(value) != len(reference):
        raise Broken(f"{what}: {len(value)} tensors instead of {len(reference)}")
    for a, b in zip(value, reference, strict=True):
        if not torch.equal(a, b):
            raise Broken(f"{what}: not equal, {decibels(a, b):.1f} dB")


# ---- what a conversion must not touch
def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a model is and that its process shares with others."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    config = getattr(model, "config", None)
    return {
        "tensors": {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in held},
        "modules": {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
        "training": {name: module.training for name, module in model.named_modules(remove_duplicate=False)},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules(remove_duplicate=False)},
        "config": copy.deepcopy(config.to_dict() if hasattr(config, "to_dict") else dict(config or {})),
        "random numbers": torch.get_rng_state(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for what in before:
        if what == "tensors":
            if before[what].keys() != after[what].keys():
                raise Broken("the original has other tensors than before")
            for name, (tensor, gradient) in before[what].items():
                now, gradient_now = after[what][name]
                if not torch.equal(tensor.nan_to_num(), now.nan_to_num()) or gradient != gradient_now:
                    raise Broken(f"the original's {name} changed")
        elif what == "random numbers":
            if not torch.equal(before[what], after[what]):
                raise Broken("the state of torch's random numbers changed")
        elif before[what] != after[what]:
            changed = before[what]
            if isinstance(changed, dict):
                changed = {k: (v, after[what].get(k)) for k, v in changed.items() if after[what].get(k) != v}
            raise Broken(f"{what} changed: {str(changed)[:300]}")


# ---- one architecture
@dataclass
class Case:
    """One model, converted one way.

    make: the unconverted model. build: the same with other weights. call: runs a model and gives its answer. floor:
    signal over error in dB that the answer must have. calibration: sample inputs. first: a call on the first sample of
    the batch alone. generate: writes text with ``use_cache`` or without. compile_with: a backend of torch.compile.
    deep: also what takes a second conversion. convolutional: whether it has convolutions. jumps: whether an error of a
    few bits may choose another expert or another code.
    """

    make: Make
    build: Make
    call: Call
    recipe: Recipe
    floor: float
    calibration: Callable[[], list[Any]]
    first: Call | None = None
    generate: Callable[..., Any] | None = None
    compile_with: str | None = None
    deep: bool = True
    convolutional: bool = False
    jumps: bool = False
    measured: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.jumps:
            self.floor -= JUMP

    def convert(self, model: nn.Module, **options: Any) -> nn.Module:
        if self.recipe.calibrated:
            options["calibration_data"] = self.calibration()
        return tw.convert_model(model, self.recipe.recipe, **options)

    def run(self, model: nn.Module, call: Call | None = None) -> Any:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some models draw random numbers in each call
            return pytree.tree_map_only(torch.Tensor, torch.clone, (call or self.call)(model))

    def failures(self) -> dict[str, str]:
        """By the name of the check: what went wrong."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._failures()

    def _failures(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, step in self._steps():
            try:
                step()
            except Exception as error:  # whatever a model or a conversion raises is the finding
                where = traceback.extract_tb(error.__traceback__)[-1]
                told = f"{str(error).strip()[:300]}"
                if not isinstance(error, Broken):
                    told = f"{type(error).__name__}: {told} ({where.filename.rpartition('/')[2]}:{where.lineno})"
                found[name] = told
                if name in ("convert", "call"):
                    break
        return found

    def _steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        self.model = self.make()
        self.truth = self.run(self.model)  # transformers puts hooks on a model that is called first
        self.before = snapshot(self.model)
        yield "convert", self.converts
        yield "call", self.answers
        yield "again", self.answers_again
        yield "original", lambda: unchanged(self.model, self.before)
        if self.first is not None:
            yield "one sample", self.answers_for_one
        if self.generate is not None:
            yield "generate", self.generates
        yield "report", self.reports
        yield "save and load", self.saves_and_loads
        yield "revert", self.reverts
        yield "copy", self.copies
        if self.deep:
            yield "in place", self.converts_in_place
        if self.compile_with:
            yield "compile", self.compiles
        yield "original at the end", self.leaves_the_original

    # ---- the checks
    def converts(self) -> None:
        self.converted = self.convert(self.model)
        if self.converted.training or type(self.converted) is not type(self.model):
            raise Broken("another class, or in training mode")

    def answers(self) -> None:
        self.answer = self.run(self.converted)
        if len(tensors(self.answer)) != len(tensors(self.truth)):
            raise Broken("another number of tensors in the answer")
        self.measured["call"], *others = self.ratios(self.answer)
        if self.measured["call"] < self.floor:
            raise Broken(f"the answer: {self.measured['call']:.1f} dB, less than {self.floor:g}")
        if others and min(others) < self.floor - SLACK:
            raise Broken(f"a further part of the answer: {min(others):.1f} dB, less than {self.floor - SLACK:g}")

    def ratios(self, answer: Any) -> list[float]:
        """Signal over error of each tensor of an answer; of a list that has as many items as a network finds, one."""
        pairs = list(zip(tensors(answer), tensors(self.truth), strict=True))
        return [decibels(*pairs[0]), *(decibels(a, b) for a, b in pairs[1:] if a.shape == b.shape)]

    def holds(self, answer: Any) -> bool:
        """Whether an answer is as close to the float model's as it must be."""
        first, *others = self.ratios(answer)
        return first >= self.floor and min(others, default=math.inf) >= self.floor - SLACK

    def main(self, answer: Any) -> torch.Tensor:
        """The tensor that the answer is judged by: the first."""
        return tensors(answer)[0]

    def answers_again(self) -> None:
        for turn in ("second", "third"):
            self._again(self.converted, f"the {turn} call")

    def _again(self, model: nn.Module, what: str) -> None:
        """The answer of before: equal, or where there are convolutions in float to within the order of their sums,
        which a recording may change, and what rounding to int8 makes of that.
        """
        if not self.convolutional:
            return same(self.run(model), self.answer, what)
        for value, reference in zip(tensors(self.run(model)), tensors(self.answer), strict=True):
            close(value, reference, 90 if self.recipe.weights_alone else 40, what)

    def answers_for_one(self) -> None:
        assert self.first is not None
        alone, float_alone = (self.main(self.run(model, self.first)) for model in (self.converted, self.model))
        whole = self.main(self.truth)[:1]
        if float_alone.shape != whole.shape or decibels(float_alone, whole) < 80:
            return  # the float model's answer for a sample depends on the batch
        self.measured["one sample"] = close(alone, self.main(self.answer)[:1], self.floor + 10, "one sample by itself")

    def generates(self) -> None:
        assert self.generate is not None
        with torch.inference_mode():
            float_cached, float_whole = (self.generate(self.model, use_cache=cache) for cache in (True, False))
            if not torch.equal(float_cached.sequences, float_whole.sequences):
                return  # nothing to keep
            cached, whole = (self.generate(self.converted, use_cache=cache) for cache in (True, False))
        if not torch.equal(cached.sequences, whole.sequences):
            raise Broken(f"with a cache {cached.sequences[0].tolist()}, without {whole.sequences[0].tolist()}")
        a, b = torch.stack(list(cached.logits)), torch.stack(list(whole.logits))
        self.measured["generate"] = close(a, b, min(self.floor, 60), "logits with a cache")

    def reports(self) -> None:
        report = tw.report(self.converted)
        json.dumps(report.to_json())
        str(report)
        report.details()
        total = sum(line.bytes_after for line in report.layers) + sum(line.bytes for line in report.others)
        if total != report.model_bytes_after:
            raise Broken(f"the lines add up to {total} of {report.model_bytes_after} bytes")

    def saves_and_loads(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tw.save_model(self.converted, folder)
            loaded = tw.load_model(folder, self.build)
        self._again(loaded, "loaded")
        states = [dict(model.state_dict()) for model in (loaded, self.converted)]
        if states[0].keys() != states[1].keys() or any(not torch.equal(states[0][k], v) for k, v in states[1].items()):
            raise Broken("the state dict changed")

    def reverts(self) -> None:
        reverted = tw.revert_model(self.converted)
        shapes, expected = (
            {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
            for model in (reverted, self.model)
        )
        # A folded batch-norm is gone, and a calibrated convolution has the bias that corrects its rounding.
        changed = {name for name, _ in shapes.items() ^ expected.items()}
        more = {name for name in shapes.keys() - expected.keys() if name.endswith(".bias")}
        if self.recipe.recipe != "fuse" and not any("running" in name for name in expected) and changed - more:
            raise Broken(f"another state dict: {sorted(changed - more)[:4]}")
        # A product with float activations may be taken in bfloat16, which errs so much less than the least bits.
        floor = min(36, self.floor + 28) if self.recipe.weights_alone and not self.jumps else self.floor - 3
        self.measured["revert"] = close(self.main(self.run(reverted)), self.main(self.answer), floor, "reverted")
        self._again(self.converted, "the converted model after revert_model")

    def copies(self) -> None:
        self._again(copy.deepcopy(self.converted), "a deepcopy")
        try:
            self._pickled(self.model)
        except (RuntimeError, AttributeError, pickle.PicklingError):
            return  # nor can the float model be pickled
        self._again(self._pickled(self.converted), "pickled and read back")

    @staticmethod
    def _pickled(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def converts_in_place(self) -> None:
        model = self.make()
        self._again(self.convert(model, inplace=True), "converted in place")

    def compiles(self) -> None:
        torch.compiler.reset()
        compiled = torch.compile(self.converted, backend=self.compile_with)
        with torch.no_grad():
            answer = self.call(compiled)
        self.measured["compile"] = close(self.main(answer), self.main(self.answer), self.floor + 10, "compiled")

    def leaves_the_original(self) -> None:
        unchanged(self.model, self.before)
        same(self.run(self.model), self.truth, "the original's answer")
