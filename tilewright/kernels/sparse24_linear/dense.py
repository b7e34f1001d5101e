"""Linear layers on 2:4 weights, unpacked once for each layer and multiplied densely: on every device.

The dense weight is made at the first call and lives as long as the 2:4 one (``dispatch.packed``). Float weights go to
``F.linear``, which is what an ``nn.Linear`` calls; int8 and int4 weights to whatever serves the dense operator there.
On a GPU this serves the shapes that 2:4 does not pay for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from tilewright.kernels.dispatch.card import card_of
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route_call
from tilewright.kernels.epilogue import finish, finish_rows
from tilewright.kernels.formats import sparse24
from tilewright.kernels.matrices import as_matrix, wide_product

#: The dense operator that each is handed on to.
_DENSE = {"sparse24_int8_linear": "int8_linear", "sparse24_int4_linear": "int4_linear"}


def why_not(problem: Problem) -> str | None:
    """Why a dense product does not take the problem, or None."""
    return "nothing to multiply" if 0 in (problem.m, problem.n, problem.k) else None


def handed_on(problem: Problem) -> Problem | None:
    """The problem that the router is asked for the unpacked weight, or None where PyTorch multiplies."""
    dense = _DENSE.get(problem.op)
    return None if dense is None else replace(problem, op=dense)


def unpacked(weight_values: torch.Tensor, weight_meta: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [N, K] in ``dtype``, made once."""
    return packed(
        weight_values,
        f"2:4 unpacked, {k} columns, {dtype}",
        lambda: sparse24.unpack(weight_values, weight_meta, k).to(dtype),
        weight_meta,
    )


def _unpacked_int4(
    weight_values: torch.Tensor, weight_meta: torch.Tensor, weight_zero: torch.Tensor | None, group_size: int, k: int
) -> torch.Tensor:
    return packed(
        weight_values,
        f"2:4 int4 unpacked, {k} columns in groups of {group_size}",
        lambda: sparse24.unpack_int4(weight_values, weight_meta, weight_zero, group_size, k),
        weight_meta,
        weight_zero,
    )


# ---- once the weight is known
def prepare_float(
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    compute_dtype: torch.dtype | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``sparse24_linear`` of ``k`` columns as a function of x and the residual, for as long as nobody writes into the
    tensors given here.
    """
    weights: dict[torch.dtype, torch.Tensor] = {}

    def weight_for(dtype: torch.dtype) -> torch.Tensor:
        narrow = compute_dtype or dtype
        # A CPU's 16-bit products, where they are not oneDNN's, are slower than float32 ones, and exact there.
        library = torch.float32 if narrow in (torch.float16, torch.bfloat16) else narrow
        return packed(
            weight_values,
            f"2:4 unpacked, {k} columns, {narrow} as {library}",
            lambda: sparse24.unpack(weight_values, weight_meta, k).to(narrow).to(library),
            weight_meta,
        )

    def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        dtype = x.dtype
        weight = weights.get(dtype)
        if weight is None:
            weight = weights[dtype] = weight_for(dtype)
        library = weight.dtype
        plain = activation == "none" and residual is None and library == dtype
        if plain and (bias is None or bias.dtype == library):
            return F.linear(x, weight, bias)  # the very call of an nn.Linear
        y = F.linear(x.to(library), weight)
        return finish_rows(y if library == torch.float64 else y.float(), None, bias, residual, activation, dtype)

    return call


def prepare_int8(
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    channel_scale: torch.Tensor | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``sparse24_int8_linear``, likewise; for inputs of one shape and dtype."""
    arguments = {
        "weight": unpacked(weight_values, weight_meta, k, torch.int8),
        "weight_scale": weight_scale,
        "bias": bias,
        "activation": activation,
        "channel_scale": channel_scale,
    }
    return _handing_on("int8_linear", len(weight_values), arguments, k)


def prepare_int4(
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    activation: str,
    compute_dtype: torch.dtype | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``sparse24_int4_linear``, likewise."""
    arguments = {
        "weight_packed": _unpacked_int4(weight_values, weight_meta, weight_zero, group_size, k),
        "weight_scale": weight_scale,
        "weight_zero": weight_zero,
        "bias": bias,
        "group_size": group_size,
        "activation": activation,
        "compute_dtype": compute_dtype,
    }
    return _handing_on("int4_linear", len(weight_values), arguments, k)


def _handing_on(op: str, n: int, arguments: dict[str, Any], k: int) -> Callable[..., torch.Tensor]:
    """A function of x and the residual that the implementation of the dense operator serves which the router names at
    its first call. arguments: of the operator, without x and the residual.
    """
    found: list[Callable[..., torch.Tensor]] = []

    def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not found:
            card = card_of(op)
            if card is None:
                raise ValueError(f"there is no operator {op!r}")
            problem = card.problem(op, {**arguments, "x": x, "residual": residual}, n)
            implementation = route_call(problem).implementation
            prepare = implementation.prepared
            found.append(
                prepare(**arguments, k=k) if prepare else functools.partial(implementation.function, **arguments)
            )
        return found[0](x=x, residual=residual)

    return call


# ---- operators
def sparse24_linear(
    x: torch.Tensor,
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See ``reference.sparse24_linear``."""
    if x.device.type == "cpu":
        return prepare_float(weight_values, weight_meta, bias, activation, compute_dtype, x.shape[-1])(x, residual)
    narrow = compute_dtype or x.dtype
    weight = unpacked(weight_values, weight_meta, x.shape[-1], narrow)
    plain = activation == "none" and residual is None and narrow == x.dtype
    if plain and (bias is None or bias.dtype == narrow):
        return F.linear(x, weight, bias)  # the library adds the bias and rounds once
    y = wide_product(as_matrix(x).to(narrow), weight).view(*x.shape[:-1], len(weight))
    return finish(y, bias, residual, activation, x.dtype)
