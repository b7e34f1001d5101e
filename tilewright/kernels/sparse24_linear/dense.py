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
from tilewright.kernels.epilogue import finish_rows
from tilewright.kernels.formats import sparse24
from tilewright.kernels.matrices import as_matrix, wide_product

#: The dense operator that each is handed on to.
_DENSE = {"sparse24_int8_linear": "int8_linear", "sparse24_int4_linear": "int4_linear"}


def handed_on(problem: Problem) -> Problem | None:
    """The problem that the router is asked for the unpacked weight, or None where PyTorch multiplies."""
    dense = _DENSE.get(problem.op)
    return None if dense is None else replace(problem, op=dense)


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
        widened = weight_values.is_cpu and narrow in (torch.float16, torch.bfloat16)
        library = torch.float32 if widened else narrow
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
            return F.linear(x, weight, bias)  # the very call of an nn.Linear, which rounds once
        if library in (torch.float32, torch.float64):
            y = F.linear(x.to(library), weight)
        else:
            y = wide_product(as_matrix(x).to(library), weight).view(*x.shape[:-1], len(weight))
        return finish_rows(y, None, dtype, bias, residual, activation)

    return call


def prepare_integers(
    weight_values: torch.Tensor, weight_meta: torch.Tensor, k: int, **others: Any
) -> Callable[..., torch.Tensor]:
    """``sparse24_int8_linear`` or ``sparse24_int4_linear``, likewise; for inputs of one shape and dtype. The router
    names what serves the dense operator at the first call.
    """
    n, zero, group_size = len(weight_values), others.get("weight_zero"), others.get("group_size")

    def unpack() -> torch.Tensor:
        if group_size is None:
            return sparse24.unpack(weight_values, weight_meta, k)
        return sparse24.unpack_int4(weight_values, weight_meta, zero, group_size, k)

    layout = f"2:4 unpacked, {k} columns in groups of {group_size}"
    op, name = ("int8_linear", "weight") if group_size is None else ("int4_linear", "weight_packed")
    arguments = {name: packed(weight_values, layout, unpack, weight_meta, zero), **others}
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
