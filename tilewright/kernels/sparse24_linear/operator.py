"""The cards of linear layers on 2:4 weights, with float, int8 and int4 values."""

from __future__ import annotations

from dataclasses import replace

from tilewright.kernels.dispatch.card import Way, everywhere, on_gpu, prepared_on_cpu
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats.int8 import Int8
from tilewright.kernels.formats.sparse24 import Sparse24, kept_group_size
from tilewright.kernels.formats.weight import Float
from tilewright.kernels.linear import ACTIVATION, END, int4_weight, linear_card

_UNPACK = on_gpu("Triton, unpacked in registers", ".triton_unpack")
_FRAGMENTS = on_gpu("Triton, mma.sp", ".triton_fragments")
_LIBRARY = on_gpu("cuSPARSELt", ".cusparselt")


def _unpacked(prepare: str) -> Way:
    return everywhere("unpacked once, then dense", "", "..matrices:why_empty", prepare, ".dense:handed_on")


def _int4_values(problem: Problem) -> Sparse24:
    kept = kept_group_size(problem.k, problem.group_size or max(problem.k, 1))
    return Sparse24(replace(int4_weight(problem), group_size=kept))


CARDS = (
    linear_card(
        "sparse24_linear",
        __package__,
        f"(Tensor x, Tensor weight_values, Tensor weight_meta, {END}, {ACTIVATION}, ScalarType? compute_dtype=None) "
        "-> Tensor",
        Sparse24,
        lambda problem: Sparse24(Float(problem.multiply_dtype)),
        (
            _FRAGMENTS,
            _UNPACK,
            _LIBRARY,
            prepared_on_cpu("C kernel, 2:4", ".compressed:prepare_float"),
            prepared_on_cpu("unpacked once for oneDNN", ".cpu:prepare"),
            _unpacked(".dense:prepare_float"),
            everywhere("reference", ".reference"),
        ),
    ),
    linear_card(
        "sparse24_int8_linear",
        __package__,
        f"(Tensor x, Tensor weight_values, Tensor weight_meta, Tensor weight_scale, {END}, {ACTIVATION}, "
        "Tensor? channel_scale=None) -> Tensor",
        Sparse24,
        lambda problem: Sparse24(Int8()),
        (_FRAGMENTS, _UNPACK, _LIBRARY, _unpacked(".dense:prepare_integers"), everywhere("reference", ".reference")),
    ),
    linear_card(
        "sparse24_int4_linear",
        __package__,
        "(Tensor x, Tensor weight_values, Tensor weight_meta, Tensor weight_scale, Tensor? weight_zero=None, "
        f"{END}, *, int group_size, {ACTIVATION}, ScalarType? compute_dtype=None) -> Tensor",
        Sparse24,
        _int4_values,
        (
            _UNPACK,
            prepared_on_cpu("unpacked once for oneDNN", ".cpu:prepare"),
            _unpacked(".dense:prepare_integers"),
            everywhere("reference", ".reference"),
        ),
    ),
)
