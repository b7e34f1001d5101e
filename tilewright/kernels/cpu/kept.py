"""Layers of integer weights and float activations whose weight is held dequantised as well, because the user asked for
speed: calls with many rows are then products of the float library alone.

The weight is held in the form that the library multiplies fastest here: bfloat16 in the order of oneDNN where there is
AMX and that is what is multiplied, else float32. It is made when a call first wants it, follows the compact weight as
every repacked one does (``dispatch.packed``) and is never saved or copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.kernels.cpu import native, panels
from tilewright.kernels.cpu.probes import pack_bfloat16, packed_product, why_no_packed_bfloat16
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.epilogue import finish_rows

#: The name of the implementation.
NAME = "kept dequantised"


def held_dtype(x_dtype: torch.dtype, compute_dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype in which a weight is kept for activations of ``x_dtype``; None where none is."""
    if panels.takes(x_dtype, compute_dtype):
        return torch.float32
    if native.why_no_native() or native.isa() != "amx" or why_no_packed_bfloat16():
        return None
    return torch.bfloat16 if x_dtype in native.DTYPES and (compute_dtype or x_dtype) == torch.bfloat16 else None


def why_not(problem: Problem) -> str | None:
    """Why a kept weight does not take the problem, or None."""
    if not problem.keep_dequantized:
        return "the weight is not kept dequantised"
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if held_dtype(problem.x_dtype, problem.compute_dtype) is None:
        return f"the library is no faster in {problem.multiply_dtype} here"
    return None


class _BFloat16:
    """A linear layer as a function of x and the residual, by oneDNN."""

    def __init__(self, weight: torch.Tensor, n: int, k: int, bias: torch.Tensor | None, activation: str):
        self._weight, self._n, self._k, self._activation = weight, n, k, activation
        self._bias = None if bias is None else bias.detach().float()

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K], residual [..., N] or None -> [..., N] in the dtype of x."""
        y = packed_product(x.reshape(-1, self._k).to(torch.bfloat16).contiguous(), self._weight, self._bias)
        if self._activation != "none" or residual is not None:
            y = finish_rows(y.float(), None, x.dtype, bias=None, residual=residual, activation=self._activation)
        return y.to(x.dtype).view(*x.shape[:-1], self._n)

    def for_rows(self, shape: torch.Size, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """The same."""
        return self


def prepare(
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    compute_dtype: torch.dtype | None,
    k: int,
    weight: torch.Tensor | None = None,
    weight_packed: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
    group_size: int | None = None,
) -> Callable[..., torch.Tensor]:
    """``int8_weight_only_linear`` (of ``weight``) or ``int4_linear`` (of ``weight_packed``) as a function of x and the
    residual.
    """
    stored = weight_packed if weight is None else weight
    if stored is None:
        raise ValueError("a weight is missing")
    group = group_size or k
    parts = stored, weight_scale, weight_zero

    def pack() -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return pack_bfloat16(panels.widened(*parts, group, k).to(torch.bfloat16))

    def in_bfloat16() -> _BFloat16:
        layout = native.layout(f"dequantised bfloat16, {k} columns in groups of {group}")
        return _BFloat16(packed(stored, layout, pack, weight_scale, weight_zero), len(stored), k, bias, activation)

    def make(dtype: torch.dtype) -> panels.Panels | _BFloat16:
        if held_dtype(dtype, compute_dtype) == torch.bfloat16:
            return in_bfloat16()
        return panels.Panels(*parts, bias, activation, group, k, keep=True)

    def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return make(x.dtype)(x, residual)

    call.for_rows = lambda shape, dtype: make(dtype).for_rows(shape, dtype)  # type: ignore[attr-defined]
    return call
