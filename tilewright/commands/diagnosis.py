"""What converting a model could give, layer by layer, before anything is converted: arithmetic, not measurement.

    print(tilewright.diagnose(model, batch=8, chip="H200"))

A linear layer sees as many rows as the batch times the positions: with ``example_inputs`` they are counted, also on the
meta device, where it costs nothing. The best that a format could give is the ratio of two floors (``roofline``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tilewright.convert import calibrate, recipes
from tilewright.convert.layers import as_linear, is_converted, is_linear
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.convolution import convolution_problem
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.roofline import Ceilings, ceilings_for, floor, measure_cpu
from tilewright.nn import ConvLayer, Int4Linear, QuantizedLinear

#: What pays at all: below this, a layer is better left alone.
WORTHWHILE = 1.1


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer. problem: its work as it is. microseconds: its floor as it is; bound: by "memory" or "compute".
    formats: the most that each scheme could give, as a factor. verdict: in words.
    """

    name: str
    kind: str
    problem: Problem
    microseconds: float
    bound: str
    formats: dict[str, float]
    verdict: str

    @property
    def best(self) -> tuple[str, float]:
        """The scheme that could give most, and how much."""
        return max(self.formats.items(), key=lambda item: item[1])

    @property
    def helps(self) -> bool:
        """Whether converting it can pay at all."""
        return not self.verdict.startswith("this will not help")


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found. ``str()`` gives a table."""

    model: str
    ceilings: Ceilings
    layers: tuple[LayerDiagnosis, ...]
    unseen: tuple[str, ...] = ()

    def headlines(self) -> list[str]:
        """The whole in words, one fact a line."""
        total = sum(layer.microseconds for layer in self.layers)
        least = sum(layer.microseconds / max(layer.best[1] if layer.helps else 1.0, 1.0) for layer in self.layers)
        device = self.ceilings
        rates = (device.float32, device.float16, device.int8)
        floats, halves, integers = (f"{rate / 1e12:.3f}"[:5].rstrip(".") for rate in rates)
        lines = [
            f"{self.model} on {device.name} ({device.source}): {device.bytes / 1e12:.2f} TB/s, "
            f"{floats} TOP/s in float32, {halves} in bfloat16, {integers} in int8",
            f"{len(self.layers)} layers take {total:.3g} us at the least, {least:.3g} us in the best formats: "
            f"{total / least if least else 1:.2f}x is the most that converting these layers could give",
        ]
        if self.unseen:
            lines.append(f"the inputs did not reach {len(self.unseen)} layers: {', '.join(self.unseen[:4])}")
        return lines

    def __str__(self) -> str:
        import io

        from rich.console import Console

        console = Console(file=io.StringIO(), width=150)
        self.print(console)
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    def print(self, console: Any) -> None:
        """Print the table."""
        from rich.table import Table

        for line in self.headlines():
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        table = Table(box=None, pad_edge=False)
        for title in ("layer", "M x N x K", "floor us", "bound by", "best possible"):
            table.add_column(title, justify="right" if title == "floor us" else "left", overflow="fold")
        for layer in self.layers:
            p = layer.problem
            table.add_row(
                layer.name,
                f"{p.m} x {p.n} x {p.k}",
                f"{layer.microseconds:.3g}",
                layer.bound,
                layer.verdict,
                style="" if layer.helps else "yellow",
            )
        console.print(table)


def diagnose(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    batch: int = 1,
    chip: str | Ceilings = "cpu",
    dtype: torch.dtype | None = None,
) -> Diagnosis:
    """Find what bounds each linear and convolution layer of ``model``, which is left as it is.

    example_inputs: one input as a mapping, a tuple or a tensor; without it each linear layer is taken to see ``batch``
    rows, and convolutions are left out. chip: a name of ``roofline.CEILINGS`` or one that contains it, or "cpu", which
    is measured. dtype: of weights and activations; default: each layer's.

    Raises ValueError for an unknown chip, a batch below 1 and a model without such layers; TypeError for what is no
    ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is an nn.Module, not {type(model).__name__}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    layers = {name: m for name, m in model.named_modules() if _is_layer(m)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer that is not converted yet")
    ceilings = chip if isinstance(chip, Ceilings) else measure_cpu() if chip == "cpu" else ceilings_for(chip)
    seen = {} if example_inputs is None else _shapes(model, layers, example_inputs)
    found, unseen = [], []
    for name, module in layers.items():
        shape = seen.get(name)
        if shape is None and (example_inputs is not None or not is_linear(module)):
            unseen.append(name or "(root)")
            continue
        problem = _problem(module, shape, batch, dtype)
        found.append(_judge(name or "(root)", type(module).__name__, problem, ceilings))
    return Diagnosis(type(model).__name__, ceilings, tuple(found), tuple(unseen))


def _is_layer(module: nn.Module) -> bool:
    return not is_converted(module) and (is_linear(module) or isinstance(module, nn.Conv2d))


def _shapes(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any) -> dict[str, torch.Size]:
    """The shape of what reaches each layer."""
    seen: dict[str, torch.Size] = {}

    def hear(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            seen[name] = args[0].shape

    with calibrate.listening(layers, hear):
        calibrate.run(model, [inputs])
    return seen


def _problem(module: nn.Module, shape: Iterable[int] | None, batch: int, dtype: torch.dtype | None) -> Problem:
    if isinstance(module, nn.Conv2d):
        images, channels, height, width = shape or (1, 1, 1, 1)
        left, right, top, bottom = module._reversed_padding_repeated_twice
        pads = (top, bottom, left, right)
        window: Any = (module.out_channels, module.kernel_size, module.stride, pads, module.dilation, module.groups)
        sizes = ConvGeometry(images, channels, height, width, *window)
        dtype = dtype or module.weight.dtype
        return convolution_problem("conv2d", sizes, dtype, dtype)
    linear = as_linear(module)
    m = batch if shape is None else math.prod(tuple(shape)[:-1])
    return Problem("linear", m, linear.out_features, linear.in_features, dtype or linear.weight.dtype)


def _judge(name: str, kind: str, problem: Problem, ceilings: Ceilings) -> LayerDiagnosis:
    now = floor(problem, ceilings)
    formats, floors = {}, {}
    # Weight-only formats are multiplied in 16 bits where that is the model's dtype or the faster one.
    half = torch.bfloat16 if ceilings.float16 > ceilings.float32 else None
    for stem, scheme in recipes.formats(QuantizedLinear if problem.conv is None else ConvLayer).items():
        if scheme.lossless:
            continue
        group_size = getattr(scheme, "group_size", None)
        converted = replace(problem, op=scheme.module.op_name, group_size=group_size, scale_dtype=torch.bfloat16)
        if problem.conv is not None:
            converted = replace(converted, x_dtype=torch.int8, out_dtype=torch.int8)
        elif problem.x_dtype == torch.float32 and half is not None:
            converted = replace(converted, compute_dtype=half)
        floors[stem] = floor(converted, ceilings)
        formats[stem] = now.seconds / floors[stem].seconds if floors[stem].seconds else 1.0
    best = max(formats, key=lambda stem: formats[stem])
    saved = now.seconds - floors[best].seconds
    if not now.seconds:
        verdict = "this will not help because there is nothing to compute"
    elif formats[best] < WORTHWHILE:
        verdict = _why_not(problem, now.bound, formats[best])
    elif saved < ceilings.overhead:
        verdict = (
            f"this will not help because at most {1e6 * saved:.2g} us could be saved, and a call alone costs about "
            f"{1e6 * ceilings.overhead:.2g} us"
        )
    else:
        verdict = f"{best} up to {formats[best]:.2f}x"
        weight_only = formats.get(Int4Linear.scheme_name, math.inf)
        if weight_only < WORTHWHILE:
            verdict += "; weight-only formats will not help because the arithmetic takes longer than the weight"
    return LayerDiagnosis(name, kind, problem, now.microseconds, now.bound, formats, verdict)


def _why_not(problem: Problem, bound: str, best: float) -> str:
    if bound == "compute":
        return f"this will not help because the arithmetic is the limit, in every format ({best:.2f}x at most)"
    weight = problem.n * problem.k
    activations = problem.m * (problem.n + problem.k)
    if activations > weight:
        return (
            f"this will not help because reading and writing {problem.m} rows of activations takes longer than reading "
            f"the weight ({best:.2f}x at most)"
        )
    return f"this will not help because no format moves markedly fewer bytes ({best:.2f}x at most)"
