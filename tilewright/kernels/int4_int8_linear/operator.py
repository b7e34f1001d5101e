"""The card of ``int4_int8_linear``: int4 weights in groups, int8 activations (W4A8)."""

from __future__ import annotations

from tilewright.kernels.dispatch.card import Kernel, everywhere, on_cpu, on_gpu, prepared_on_cpu
from tilewright.kernels.formats.int4 import Int4
from tilewright.kernels.linear import ACTIVATION, END, QUANTIZE, int4_weight, linear_card

CARDS = (
    linear_card(
        "int4_int8_linear",
        __package__,
        f"(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero=None, {END}, "
        f"Tensor? channel_scale=None, *, int group_size, {ACTIVATION}) -> Tensor",
        Int4,
        int4_weight,
        (
            on_gpu("Triton, dequantise and multiply", ".triton_dequantize"),
            on_gpu("Triton, fused", ".triton_fused"),
            prepared_on_cpu("C kernel", "..cpu.linear:prepare_int4_int8", ".cpu:why_not_native"),
            on_cpu("oneDNN by group", ".cpu"),
            everywhere("reference", ".reference"),
        ),
        (QUANTIZE, Kernel(".triton_fused")),
        remembered=True,
    ),
)
