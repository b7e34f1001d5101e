"""Operators ``tilewright::*`` as PyTorch's own, for programs that run where Tilewright is not.

Each is its reference, but for products. A reference multiplies in a wider type than the operands have, which is exact
and slow: here int8 ones are taken by ``aten::_int_mm``, exact in int32, products of 16-bit floats in that type, and
int8 convolutions in float32, whose sums of integers are exact below 2^24. Nothing works in place, as export demands:
references go on with what such a method returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from tilewright.deploy.onnx.symbols import overload
from tilewright.kernels.dispatch.card import REFERENCE, cards
from tilewright.kernels.dispatch.router import implementations
from tilewright.kernels.epilogue import finish
from tilewright.kernels.formats import int4
from tilewright.kernels.quantize.reference import quantize_per_row

Tensor = torch.Tensor
_WIDEN = (Tensor.to, Tensor.double)
_MATRIX_PRODUCTS = (Tensor.matmul, Tensor.__matmul__)
_OUT_OF_PLACE = {Tensor.mul_: Tensor.mul}


class NarrowProducts(TorchFunctionMode):
    """Within it, tensors that were widened to be multiplied are multiplied as what they were."""

    def __init__(self) -> None:
        super().__init__()
        #: By what was widened, or the transpose of it: what it was before.
        self.narrow = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take note of a wider copy, and put products in its place where such copies are multiplied."""
        if func in _MATRIX_PRODUCTS:
            return _product(*args, *(self.narrow.get(operand, operand) for operand in args))
        if func == torch.conv2d and len(self.narrow):
            args = [each.float() if isinstance(each, Tensor) and each.dtype == torch.float64 else each for each in args]
        result = _OUT_OF_PLACE.get(func, func)(*args, **(kwargs or {}))
        if func in _WIDEN and result.dtype.itemsize > args[0].dtype.itemsize:
            self.narrow[result] = args[0]
        elif func == Tensor.t and args[0] in self.narrow:
            self.narrow[result] = self.narrow[args[0]].t()
        return result


def _product(x: Tensor, weight: Tensor, narrow_x: Tensor, narrow_weight: Tensor) -> Tensor:
    """x [..., K] by weight [K, N], of which ``narrow_x`` and ``narrow_weight`` have the same values in fewer bytes."""
    if narrow_x.dtype != torch.int8:
        return (narrow_x @ narrow_weight.to(narrow_x.dtype)).to(x.dtype)
    rows = narrow_x.reshape(-1, x.shape[-1])
    if isinstance(rows.shape[0], int) and rows.shape[0] == 1:  # a symbol keeps its strides
        # Inductor gives a single row a stride of 0, with which the operator writes nothing: two rows have theirs.
        total = torch._int_mm(F.pad(rows, (0, 0, 0, 1)), narrow_weight)[:1]
    else:
        total = torch._int_mm(rows, narrow_weight)
    return total.reshape(*x.shape[:-1], weight.shape[1])


def int4_int8_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    group_size: int,
    activation: str = "none",
    channel_scale: Tensor | None = None,
) -> Tensor:
    """As its reference, but for the sums over groups: products of float32 with the dequantised weight are faster."""
    q, scale = quantize_per_row(x, channel_scale)
    weight = int4.dequantize(weight_packed, weight_scale, weight_zero, group_size, x.shape[-1])
    return finish(F.linear(q.float(), weight) * scale.unsqueeze(-1), bias, residual, activation, x.dtype)


#: What a product of other operands alone does not make fast.
_REWRITTEN = {"int4_int8_linear": int4_int8_linear}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For ``ExportedProgram.run_decompositions``: every operator of Tilewright, and no other."""
    return {overload(card.name): _decomposition(card.name) for card in cards()}


def _decomposition(name: str) -> Callable[..., Any]:
    definition = next(each for each in implementations(name) if each.name == REFERENCE)
    function = _REWRITTEN.get(name, definition.function)

    @functools.wraps(function)
    def decomposed(*args: Any, **kwargs: Any) -> Any:
        with NarrowProducts():
            return function(*args, **kwargs)

    return decomposed
