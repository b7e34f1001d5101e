"""The card of ``int8_weight_only_linear``: int8 weights, float activations (W8A16)."""

from __future__ import annotations

from dataclasses import replace

from tilewright.kernels.dispatch.card import Kernel, everywhere, on_cpu, on_gpu, prepared_on_cpu
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.int8 import Int8
from tilewright.kernels.linear import ACTIVATION, END, KEEP, linear_card


def _multiplied(problem: Problem) -> Problem:
    """The launcher rounds larger batches to the dtype of the product before it chooses."""
    from tilewright.kernels.int8_weight_only_linear.triton_swapped import CAST_ON_LOAD_M

    return replace(problem, x_dtype=problem.multiply_dtype) if problem.m > CAST_ON_LOAD_M else problem


CARDS = (
    linear_card(
        "int8_weight_only_linear",
        __package__,
        f"(Tensor x, Tensor weight, Tensor weight_scale, {END}, {ACTIVATION}, ScalarType? compute_dtype=None, "
        f"*, {KEEP}) -> Tensor",
        Int8,
        lambda problem: Int8(),
        (
            on_gpu("Triton, operands swapped", ".triton_swapped"),
            on_gpu("Triton, dequantise and multiply", ".triton_dequantize"),
            on_gpu("dequantise and multiply", ".dequantize"),
            prepared_on_cpu("C kernel", "..cpu.linear:prepare_weight_only", "..cpu.linear:why_not_weight_only"),
            on_cpu("ATen int8pack", ".cpu"),
            prepared_on_cpu("dequantised blocks", ".cpu:prepare_blocks", "..matrices:why_empty"),
            prepared_on_cpu("kept dequantised", "..cpu.kept:prepare"),
            everywhere("reference", ".reference"),
        ),
        (Kernel(".triton_swapped", _multiplied),),
    ),
)
