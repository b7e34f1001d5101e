"""The card of ``int4_linear``: int4 weights in groups, float activations (W4A16)."""

from __future__ import annotations

from tilewright.kernels.dispatch.card import Kernel, everywhere, on_cpu, on_gpu, prepared_on_cpu
from tilewright.kernels.formats.int4 import Int4
from tilewright.kernels.linear import ACTIVATION, END, KEEP, int4_weight, linear_card

CARDS = (
    linear_card(
        "int4_linear",
        __package__,
        f"(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero=None, {END}, *, int group_size, "
        f"{ACTIVATION}, ScalarType? compute_dtype=None, {KEEP}) -> Tensor",
        Int4,
        int4_weight,
        (
            on_gpu("Triton, mma.sync", ".triton_fragments"),
            on_gpu("Triton, fused", ".triton_fused"),
            on_gpu("Triton, dequantise and multiply", ".triton_dequantize"),
            prepared_on_cpu("C kernel", "..cpu.linear:prepare_weight_only", ".cpu:why_not_native"),
            on_cpu("ATen int4pack", ".cpu"),
            prepared_on_cpu("dequantised blocks", ".cpu:prepare_blocks", ".cpu:why_not_blocks"),
            prepared_on_cpu("kept dequantised", "..cpu.kept:prepare", ".cpu:why_not_kept"),
            everywhere("dequantise and multiply", ".dequantize"),
            everywhere("reference", ".reference"),
        ),
        (Kernel(".triton_fused"), Kernel(".triton_fragments"), Kernel(".triton_dequantize")),
    ),
)
