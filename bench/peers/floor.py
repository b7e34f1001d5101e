"""The least time that a piece of work can take on this machine, from what its layers multiply and read.

The longer of two counts (Williams et al., "Roofline", CACM 2009): the products of linear layers and convolutions at the
measured peak of the format and those of attention at that of float32, or weights, inputs and results at the measured
bandwidth of memory. Weights that stay in a last-level cache between two calls are read faster than that, so small
models may come out above 100 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from bench.peers import networks

WEIGHT_BITS = {"fp32": 32, "int8": 8, "int8 weights": 8, "int4": 4 + 16 / 128, "int4 x int8": 4 + 16 / 128}
#: Which peak the products of a format are held against.
ARITHMETIC = {
    "fp32": "float32",
    "int8": "int8",
    "int8 weights": "bfloat16",
    "int4": "bfloat16",
    "int4 x int8": "int8",
}


@dataclass(frozen=True)
class Counts:
    """operations: of linear layers and convolutions, a product and its addition being two; attention: of attention;
    weights: how many those layers have; elements: float32 values of the input and of the result.
    """

    operations: int
    attention: int
    weights: int
    elements: int


@dataclass(frozen=True)
class Peaks:
    """Measured on this machine: operations a second by arithmetic, and bytes read from memory a second."""

    float32: float
    bfloat16: float
    int8: float
    memory: float

    def words(self) -> str:
        """For the head of a table."""
        return (
            f"{self.int8 / 1e9:.0f} GOPS in int8, {self.bfloat16 / 1e9:.0f} GFLOPS in bfloat16, "
            f"{self.float32 / 1e9:.0f} in float32, {self.memory / 1e9:.1f} GB/s from memory"
        )


def highest(first: Peaks, second: Peaks) -> Peaks:
    """Of two measurements of one machine: whatever else runs only lowers a rate."""
    return Peaks(**{one.name: max(getattr(first, one.name), getattr(second, one.name)) for one in fields(Peaks)})


def measure(threads: int) -> Peaks:
    """Takes some seconds, on a quiet machine: what it finds on a busy one is no ceiling."""
    from tilewright.kernels.cpu import peaks
    from tilewright.kernels.roofline import measure_cpu

    torch.set_num_threads(threads)
    found, registers = measure_cpu(), peaks.measure()
    return Peaks(
        max(found.float32, registers.products("float32")),
        max(found.float16, registers.products("bfloat16"), registers.products("float32")),
        max(found.int8, registers.products("int8")),
        max(found.bytes, registers.bandwidth()),
    )


def count(model: nn.Module, call: Callable[[], torch.Tensor], attention: int, inputs: int) -> Counts:
    """While ``call`` runs ``model`` once. attention: operations of its attention; inputs: values that go in."""
    operations = weights = 0
    seen: set[int] = set()

    def hook(layer: Any, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        nonlocal operations, weights
        operations += 2 * result.numel() * math.prod(layer.weight.shape[1:])
        if id(layer) not in seen:
            seen.add(id(layer))
            weights += layer.weight.numel()

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    result = call()
    for handle in handles:
        handle.remove()
    return Counts(operations, attention, weights, inputs + result.numel())


def attention_operations(model: str, shape: tuple[int, ...], decode: bool) -> int:
    """Of all heads and layers: every query with every key, half of them in a causal model."""
    if model in networks.ENCODERS:
        width, depth = (384, 6) if model == "MiniLM" else (768, 12)
        return 4 * shape[0] * shape[1] ** 2 * width * depth
    if model == networks.DECODER:
        width, depth = networks.DECODER_SIZES["hidden_size"], networks.DECODER_SIZES["num_hidden_layers"]
        pairs = shape[1] if decode else shape[1] * (shape[1] + 1) // 2
        return 4 * shape[0] * pairs * width * depth
    return 0


def seconds(counts: Counts, format: str, peaks: Peaks) -> float:
    """The floor of this work in ``format``."""
    compute = counts.operations / getattr(peaks, ARITHMETIC[format]) + counts.attention / peaks.float32
    moved = counts.weights * WEIGHT_BITS[format] / 8 + 4 * counts.elements
    return max(compute, moved / peaks.memory)
