"""What a converted network must keep of the one that it was made from."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import tilewright as tw
from tests.fuzz.programs import Program


class Wrong(AssertionError):
    """A network that answers something else than it must."""


@dataclass(frozen=True)
class Format:
    """recipe, calibrated: how to convert. inputs, weights: how many steps the largest value of what a layer takes, and
    of a row of its weight, is cut into; None where it stays in float.
    """

    recipe: str
    calibrated: bool = False
    inputs: int | None = None
    weights: int | None = None


FORMATS = {
    "fuse": Format("fuse"),
    "int8": Format("int8", calibrated=True, inputs=127, weights=127),
    "int8-dynamic": Format("int8", inputs=127, weights=127),
    "int8-weight-only": Format("int8-weight-only", weights=127),
    "int8-static": Format("int8-static", calibrated=True, inputs=127, weights=127),
    "int4": Format("int4-g32", weights=15),
    "w4a8": Format("w4a8-g32", inputs=127, weights=15),
}
#: How the numbers of a float kernel may differ from PyTorch's by the order of their sums, relative to the largest;
#: and products with weights of few bits, which a processor may take in bfloat16.
FLOAT, HALF = 2**-18, 2**-8
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def answer_of(model: nn.Module, x: torch.Tensor) -> list[Any]:
    """The leaves of a model's answer, and its input after the call."""
    x = x.clone()
    with torch.inference_mode():
        return [*pytree.tree_map_only(torch.Tensor, torch.clone, pytree.tree_leaves(model(x))), x]


def ranges(model: nn.Module, inputs: list[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """By layer: the largest value that it is given and that it gives, in all its calls: one scale must hold them."""
    model, found = copy.deepcopy(model), dict[str, tuple[float, float]]()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            taken, given = found.get(name, (0.0, 0.0))
            found[name] = (max(taken, args[0].abs().max().item()), max(given, y.abs().max().item()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_hook(watch(name))
    for x in inputs:
        answer_of(model, x)
    return found


def shaken(model: nn.Module, kind: Format, most: dict[str, tuple[float, float]], number: int) -> nn.Module:
    """A copy whose layers err about twice as much as their format must, each in its own random way.

    How its answers then move is how exact the answers of a converted network can be: a difference of nearly equal
    numbers amplifies an error that a pooling makes small. most: as of ``ranges``.
    """
    model = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(number)
    half = HALF if kind.weights and not kind.inputs else FLOAT
    taken = max(1 / kind.inputs if kind.inputs else 0.0, half)
    given = 1 / kind.inputs if kind.inputs and kind.calibrated else FLOAT

    def moved(value: torch.Tensor, step: torch.Tensor | float) -> torch.Tensor:
        return value + (2 * torch.rand(value.shape, generator=noise) - 1).to(value.dtype) * step

    def shake(module: nn.Module, name: str) -> None:
        def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (moved(args[0], taken * max(args[0].abs().max().item(), most.get(name, (0.0, 0.0))[0])),)

        def after(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            return moved(y, given * max(y.abs().max().item(), most.get(name, (0.0, 0.0))[1]))

        if isinstance(module, LAYERS):
            weight = module.weight.detach()
            if kind.weights:
                step = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.dim() - 1)) / kind.weights
                module.weight = nn.Parameter(moved(weight, step))
            module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    for name, module in model.named_modules():
        if isinstance(module, (*LAYERS, nn.modules.batchnorm._BatchNorm)):
            shake(module, name)
    return model


class Judge:
    """Converts one program one way, and compares it call after call."""

    def __init__(self, program: Program, kind: Format, save: bool = True):
        self.program, self.kind, self.save = program, kind, save
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.x = torch.randn(program.shape)

    def calls(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The inputs of the calls, one after the other, on the same network."""
        x = self.x
        yield from (("the first call", x), ("the second call", x), ("the third call", x))
        yield "a batch of one", x[:1].clone()
        yield "the first call's input again", x
        yield "a larger batch", torch.cat([x, x.flip(0), x])
        if x.dim() > 2:
            yield "another size", torch.cat([x, x[..., :4]], -1)
        if x.dim() == 4:
            yield "a view of larger pictures", torch.cat([x, x], -1)[..., 3 : 3 + x.shape[-1]]
            yield "pictures with their channels last", x.to(memory_format=torch.channels_last)
        yield "the first call's input once more", x

    def __call__(self) -> None:
        """Raise ``Wrong``, with the program, for what is not as it must be."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._judge()
            except Exception as error:  # whatever a conversion or a converted network raises is the finding
                told = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
                raise Wrong(f"converted by {self.kind.recipe!r}: {told}\n{self.program}") from error

    def convert(self, model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
        """What is judged."""
        return tw.convert_model(model, self.kind.recipe, calibration_data=data or None)

    def _judge(self) -> None:
        model, kind = self.program.make(), self.kind
        truth = copy.deepcopy(model)
        try:
            answer_of(copy.deepcopy(model), self.x)
        except Exception:  # a program that PyTorch does not run says nothing
            return
        before = {name: tensor.clone() for name, tensor in self._held(model)}
        attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
        seen = self._calibration(model) if kind.calibrated else []
        try:
            converted = self.convert(model, [x.clone() for x in seen])
        except ValueError as error:
            if "nothing" in str(error):
                return
            raise
        self._unchanged(model, before, attributes)
        saved = self._saved(converted) if self.save else None
        most = ranges(truth, seen)
        shaken_models = [shaken(truth, kind, most, number) for number in range(3)]
        for what, x in self.calls():
            try:
                expected = answer_of(truth, x)
            except Exception:  # another size that the network does not take
                continue
            slack = [answer_of(each, x) for each in shaken_models]
            self._compare(what, answer_of(converted, x), expected, slack)
            if saved is not None:
                self._compare(f"{what} of the model read back", answer_of(saved, x), expected, slack)
        self._unchanged(model, before, attributes)

    def _calibration(self, model: nn.Module) -> list[torch.Tensor]:
        """Everything that the network will see: what lies outside is cut off, which is the format's right."""
        found = []
        for x in dict(self.calls()).values():
            try:
                answer_of(copy.deepcopy(model), x)
            except Exception:
                continue
            found.append(x.clone())
        return found

    def _saved(self, converted: nn.Module) -> nn.Module | None:
        with tempfile.TemporaryDirectory() as folder:
            tw.save_model(converted, folder)
            return tw.load_model(folder, self.program.make)

    def _compare(self, what: str, found: list[Any], expected: list[Any], slack: list[list[Any]]) -> None:
        if len(found) != len(expected):
            raise Wrong(f"{what}: {len(found) - 1} answers instead of {len(expected) - 1}")
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            which = "the input afterwards" if place == len(found) - 1 else f"answer {place}"
            if not isinstance(b, torch.Tensor):
                if a != b:
                    raise Wrong(f"{what}, {which}: {a} instead of {b}")
                continue
            if a.shape != b.shape or a.dtype != b.dtype:
                raise Wrong(f"{what}, {which}: {tuple(a.shape)} {a.dtype} instead of {tuple(b.shape)} {b.dtype}")
            error = (a - b).double().norm().item()
            allowed = max((each[place] - b).double().norm().item() for each in slack)
            allowed = 4 * allowed + 2**-18 * b.double().norm().item() + 1e-6
            if not error <= allowed:
                raise Wrong(
                    f"{what}, {which}: off by {error / max(b.double().norm().item(), 1e-30):.2e} of its norm,"
                    f" {error / allowed:.1f} times what {self.kind.recipe} may"
                )

    @staticmethod
    def _held(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
        return [*model.named_parameters(), *model.named_buffers()]

    def _unchanged(self, model: nn.Module, before: dict[str, torch.Tensor], attributes: dict[str, Any]) -> None:
        after = dict(self._held(model))
        if after.keys() != before.keys():
            raise Wrong("the original has other tensors")
        for name, tensor in before.items():
            if not torch.equal(tensor, after[name]):
                raise Wrong(f"the original's {name} changed")
        for name, module in model.named_modules():
            for key, value in attributes[name].items():
                if isinstance(value, bool | int | float | str | None) and vars(module)[key] != value:
                    raise Wrong(f"the original's {name}.{key} changed")
            if module.training or vars(module).keys() != attributes[name].keys():
                raise Wrong(f"the original's {name or 'root'} changed")
