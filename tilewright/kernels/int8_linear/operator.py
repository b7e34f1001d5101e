"""The cards of ``int8_linear`` and ``int8_linear_quantized``: int8 weights, int8 activations (W8A8)."""

from __future__ import annotations

from tilewright.kernels.dispatch.card import Kernel, everywhere, on_cpu, on_gpu, prepared_on_cpu
from tilewright.kernels.formats.int8 import Int8
from tilewright.kernels.linear import ACTIVATION, END, QUANTIZE, int8_rows, linear_card

_SWAPPED, _TILES = on_gpu("Triton, operands swapped", ".triton_swapped"), on_gpu("Triton, tiles", ".triton_tile")
_KERNELS = (Kernel(".triton_swapped", int8_rows), Kernel(".triton_tile", int8_rows))

CARDS = (
    linear_card(
        "int8_linear",
        __package__,
        f"(Tensor x, Tensor weight, Tensor weight_scale, {END}, {ACTIVATION}, Tensor? channel_scale=None) -> Tensor",
        Int8,
        lambda problem: Int8(),
        (
            _SWAPPED,
            _TILES,
            prepared_on_cpu("C kernel", "..cpu.linear:prepare_int8", ".cpu:why_not_native"),
            on_cpu("oneDNN", ".cpu"),
            on_cpu("exact float32", ".cpu:float_int8_linear", "..matrices:why_empty"),
            everywhere("reference", ".reference"),
        ),
        (QUANTIZE, *_KERNELS),
        remembered=True,
    ),
    linear_card(
        "int8_linear_quantized",
        __package__,
        f"(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, {END}, {ACTIVATION}, "
        "ScalarType? out_dtype=None) -> Tensor",
        Int8,
        lambda problem: Int8(),
        (
            _SWAPPED,
            _TILES,
            on_cpu("oneDNN", ".cpu"),
            on_cpu("exact float32", ".cpu:float_int8_linear_quantized", "..matrices:why_empty"),
            everywhere("reference", ".reference"),
        ),
        _KERNELS,
    ),
)
