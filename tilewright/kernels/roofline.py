"""The least time that an operator can take on a device: its bytes at the memory's rate, or its operations at the
arithmetic's, whichever is longer (Williams et al., "Roofline", CACM 2009).

    floor(problem, CEILINGS["H200"]).microseconds

Every tensor moves through memory once: what a format saves in bytes it can save in time, and no kernel does better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewright.kernels.cpu.probes import best_of
from tilewright.kernels.dispatch.card import card_of
from tilewright.kernels.dispatch.problem import Problem


@dataclass(frozen=True)
class Ceilings:
    """Of one device, each second: bytes to and from memory; operations (a multiplication and an addition are two) in
    float32, in float16 or bfloat16, and in int8. overhead: seconds of one call, from launch to result. source: where
    the figures are from.
    """

    name: str
    bytes: float
    float32: float
    float16: float
    int8: float
    overhead: float
    source: str

    def operations(self, dtype: torch.dtype) -> float:
        """The rate of products of ``dtype``."""
        if dtype in (torch.int8, torch.uint8):
            return self.int8
        return self.float16 if dtype in (torch.float16, torch.bfloat16) else self.float32


def highest(first: Ceilings, second: Ceilings) -> Ceilings:
    """Two measurements of one device: of each rate the higher one, since whatever else runs only lowers it."""
    rates = {name: max(getattr(first, name), getattr(second, name)) for name in ("bytes", "float32", "float16", "int8")}
    return replace(first, **rates, overhead=min(first.overhead, second.overhead))


_LAUNCH = 4e-6
#: By datasheet, dense. Real kernels reach 70 to 95 % of the bytes and 50 to 80 % of the operations.
CEILINGS = {
    one.name: one
    for one in (
        Ceilings("A100", 2.04e12, 19.5e12, 312e12, 624e12, _LAUNCH, "NVIDIA A100 80GB datasheet (SXM)"),
        Ceilings("L40S", 0.864e12, 91.6e12, 362e12, 733e12, _LAUNCH, "NVIDIA L40S datasheet"),
        Ceilings("H100", 3.35e12, 67e12, 989e12, 1979e12, _LAUNCH, "NVIDIA H100 datasheet (SXM)"),
        Ceilings("H200", 4.8e12, 67e12, 989e12, 1979e12, _LAUNCH, "NVIDIA H200 datasheet (SXM)"),
        Ceilings("B200", 8.0e12, 75e12, 2250e12, 4500e12, _LAUNCH, "NVIDIA DGX B200 datasheet, one GPU"),
        Ceilings("MI300X", 5.3e12, 163.4e12, 1307e12, 2615e12, _LAUNCH, "AMD Instinct MI300X datasheet"),
    )
}


def ceilings_for(name: str) -> Ceilings:
    """The device whose name is contained in ``name`` ("NVIDIA H200" has "H200"). Raises ValueError that lists them."""
    for known, found in CEILINGS.items():
        if known.lower() in name.lower():
            return found
    raise ValueError(f"no ceilings are known for {name!r}, only for {', '.join(CEILINGS)} and 'cpu', which is measured")


@dataclass(frozen=True)
class Floor:
    """memory, compute: seconds that the bytes and the operations take at least."""

    memory: float
    compute: float

    @property
    def seconds(self) -> float:
        """The longer of them."""
        return max(self.memory, self.compute)

    @property
    def microseconds(self) -> float:
        """The same in millionths."""
        return 1e6 * self.seconds

    @property
    def bound(self) -> str:
        """Which one it is: "memory" or "compute"."""
        return "memory" if self.memory >= self.compute else "compute"


def weight_bytes(problem: Problem) -> int:
    """Bytes of the weight with its scales and zero points, as the operator ``problem.op`` reads them."""
    card = card_of(problem.op)
    if card is not None and card.weight_of is not None:
        return card.weight_of(problem).nbytes(problem.n, problem.k)
    scales = 4 * problem.n if card is not None and card.integer else 0
    return problem.n * problem.k * problem.x_dtype.itemsize + scales


def floor(problem: Problem, ceilings: Ceilings) -> Floor:
    """The floor of ``problem``. ``problem.op`` "linear" or "conv2d" is the plain layer in ``x_dtype``.

    Quantisers read x and write its bytes; norms and quantisation before a product are taken to cost no further trip.
    """
    m, n, k = problem.m, problem.n, problem.k
    if problem.op.endswith("quantize") or problem.op.startswith("quantize"):
        return Floor((m * k * (problem.x_dtype.itemsize + 1) + 4 * m) / ceilings.bytes, 0.0)
    size = problem.x_dtype.itemsize
    out_size = (problem.out_dtype or problem.x_dtype).itemsize
    if problem.op == "int8_linear_quantized" and problem.out_dtype is None:
        out_size = 2
    sizes = problem.conv
    x_elements = m * k if sizes is None else sizes.batch * sizes.in_channels * sizes.height * sizes.width
    moved = x_elements * size + weight_bytes(problem) + m * n * out_size * (2 if problem.residual else 1)
    card = card_of(problem.op)
    multiplied = torch.int8 if card is not None and card.integer else problem.multiply_dtype
    return Floor(moved / ceilings.bytes, 2 * m * n * k / ceilings.operations(multiplied))


#: Seconds that one product of ``measure_cpu`` may take, and the size of the one that says whether it would take longer.
LONGEST_PRODUCT, SMALL_SIZE = 3.0, 256
#: Calls of which the fastest counts.
_CALLS = 6


def _rate(prepare: Callable[[int], Callable[[], Any]], size: int) -> float:
    """Operations a second of the product of size^3 that ``prepare(size)`` returns, or of a smaller one where that would
    take long: a dtype that the processor does not multiply may be a hundred times slower than others.
    """
    small = min(size, SMALL_SIZE)
    rate = 2 * small**3 / best_of(_CALLS, prepare(small))
    if small == size or 2 * size**3 / rate > LONGEST_PRODUCT:
        return rate
    return 2 * size**3 / best_of(_CALLS, prepare(size))


def _plain_product(size: int, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
    a = torch.randn(size, size).to(dtype)
    return lambda: a @ a


def _prepacked_product(size: int) -> Callable[[], Any]:
    a = torch.randn(size, size)
    prepacked, linear = torch.ops.mkldnn._reorder_linear_weight(a), torch.ops.mkldnn._linear_pointwise
    return lambda: linear(a, prepacked, None, "none", [], "")


def _int8_product(size: int) -> Callable[[], Any]:
    q, scale = torch.randint(-127, 128, (size, size), dtype=torch.int8), torch.ones(size)
    return lambda: torch.ops.tilewright.int8_linear_quantized(q, scale, q, scale)


def _quantised_product(size: int) -> Callable[[], Any]:
    a, q = torch.randn(size, size), torch.randint(-127, 128, (size, size), dtype=torch.int8)
    scale = torch.ones(size)
    return lambda: torch.ops.tilewright.int8_linear(a, q, scale)


def measure_cpu(size: int = 2048) -> Ceilings:
    """Ceilings of this CPU with the threads that PyTorch uses: 256 MB read or copied, whichever is faster, and products
    of size^3 on random data in float32, bfloat16 and int8 by the fastest there is here: what was reached, so a kernel
    may pass it a little. A dtype that would take longer than three seconds is multiplied in a small product. Takes
    a few seconds.
    """
    source = torch.zeros(2**26, dtype=torch.int32)
    target = torch.empty_like(source)
    floats = source.view(torch.float32)
    copied = 2 * 4 * source.numel() / best_of(4, lambda: target.copy_(source))
    # A store first reads what it overwrites, so reading alone is faster than half of copying.
    moved = max(copied, 4 * source.numel() / best_of(_CALLS, lambda: floats.sum()))
    with torch.inference_mode():
        floats32 = _rate(_plain_product, size)
        if torch.backends.mkldnn.is_available():
            floats32 = max(floats32, _rate(_prepacked_product, size))
        halves = max(floats32, _rate(functools.partial(_plain_product, dtype=torch.bfloat16), size))
        integers = max(_rate(_int8_product, size), _rate(_quantised_product, size))
        one = torch.zeros(1, 64), torch.zeros(64, 64)
        overhead = best_of(21, lambda: torch.nn.functional.linear(*one))
    words = f"measured here with {torch.get_num_threads()} threads"
    return Ceilings("this CPU", moved, floats32, halves, integers, overhead, words)
