"""Layers of integer weights and float activations through the float library: weights are widened to float32, panel by
panel, by a C kernel, and multiplied at the library's speed.

What is prepared holds for as long as nobody writes into the tensors that it was given, as in ``cpu.linear``. No
dimension is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.memory import scratch
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.epilogue import finish_rows

#: Bytes of a panel at most. In smaller ones a weight would stay in a second-level cache, but the library packs all rows
#: of x again for each: 704 rows by 2048 x 2048 took 7 % longer in panels of 8 MiB than in one.
PANEL_BYTES = 64 << 20
#: A weight of so many elements or fewer stays widened, 128 KiB, for as long as the call is prepared.
KEPT_ELEMENTS = 1 << 15
#: Below this many elements a second thread costs more than it brings.
_GRAIN = 1 << 16
#: Instruction sets whose library product of bfloat16 is faster than that of float32.
_MULTIPLY_BFLOAT16 = ("amx", "avx512_bf16")


def takes(x_dtype: torch.dtype, compute_dtype: torch.dtype | None) -> bool:
    """Whether there is a C kernel that widens to what the library multiplies fastest in place of ``compute_dtype``."""
    compute = compute_dtype or x_dtype
    if native.why_no_native() or x_dtype not in native.DTYPES or compute not in native.DTYPES:
        return False
    return compute != torch.bfloat16 or native.isa() not in _MULTIPLY_BFLOAT16


def widened(
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, group_size: int, k: int
) -> torch.Tensor:
    """The weight in float32 [N, K], in new memory."""
    made = Panels(weight, weight_scale, weight_zero, None, "none", group_size, k)
    return made.whole()


def _channels(n: int, k: int) -> int:
    """Of a panel: all are of one size, or nearly."""
    count = -(-4 * n * k // PANEL_BYTES)
    return -(-n // count)


class Panels:
    """A linear layer as a function of x and the residual. keep: the whole weight stays widened."""

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_zero: torch.Tensor | None,
        bias: torch.Tensor | None,
        activation: str,
        group_size: int,
        k: int,
        keep: bool = False,
    ):
        self._n, self._k, self._activation = len(weight), k, activation
        self._bias = None if bias is None else bias.detach().float()
        # Held, so that their memory stays where it is.
        self._weight, self._scale = weight.contiguous(), weight_scale.float().contiguous()
        self._zero = None if weight_zero is None else weight_zero.contiguous()
        self._widen = functools.partial(
            native.function("dequantize"),
            8 if weight.dtype == torch.int8 else 4,
            self._weight.data_ptr(),
            self._scale.data_ptr(),
            None if self._zero is None else self._zero.data_ptr(),
        )
        groups, row_bytes = self._scale.numel() // self._n, self._weight[0].numel() * self._weight.element_size()
        self._sizes = k, groups, min(group_size, k), row_bytes
        self._step = _channels(self._n, k)
        self._kept: torch.Tensor | None = None
        if keep:
            self._step = self._n
            layout = native.layout(f"dequantised, {k} columns in groups of {group_size}")
            self._kept = packed(weight, layout, self.whole, weight_scale, weight_zero)
        elif self._n * k <= KEPT_ELEMENTS:
            self._kept = self.whole()

    def whole(self) -> torch.Tensor:
        """The weight in float32, in new memory."""
        with torch.inference_mode(False):
            return self._panel(0, self._n, torch.empty(self._n, self._k))

    def _panel(self, first: int, last: int, to: torch.Tensor) -> torch.Tensor:
        """Channels ``first`` to ``last`` of the weight, in ``to``."""
        count = last - first
        threads = torch.get_num_threads() if count * self._k >= _GRAIN else 1
        self._widen(first, count, *self._sizes, to.data_ptr(), threads)
        return to

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] as float32 [M, K]; where it is not that already, valid until the next call of this thread.

        Rounding it to the dtype that is asked for would save nothing here: it took 7 % of 704 rows by 768 x 768.
        """
        rows = x if x.dim() == 2 else x.reshape(-1, self._k)
        if x.dtype == torch.float32:
            return rows
        return scratch((len(rows), self._k), torch.float32, "wide rows").copy_(rows)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K], residual [..., N] or None -> [..., N] in the dtype of x."""
        n, k, step, rows = self._n, self._k, self._step, self._rows(x)
        if step >= n:
            weight = self._kept
            if weight is None:
                weight = self._panel(0, n, scratch((n, k), torch.float32, "weight panel"))
            y = F.linear(rows, weight, self._bias)
        else:
            y = torch.empty(len(rows), n)
            for first in range(0, n, step):
                last = min(first + step, n)
                panel = self._panel(first, last, scratch((last - first, k), torch.float32, "weight panel")).t()
                if self._bias is None:
                    torch.mm(rows, panel, out=y[:, first:last])
                else:
                    torch.addmm(self._bias[first:last], rows, panel, out=y[:, first:last])
        if self._activation != "none" or residual is not None or x.dtype != torch.float32:
            y = finish_rows(y, None, x.dtype, bias=None, residual=residual, activation=self._activation)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], n)

    def for_rows(self, shape: torch.Size, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """The same for x of this shape and dtype, quicker where there is nothing but the product."""
        weight, bias, linear = self._kept, self._bias, F.linear
        if weight is None or self._activation != "none" or dtype != torch.float32:
            return self

        def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            return linear(x, weight, bias) if residual is None else self(x, residual)

        return call


def prepare(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    group_size: int,
    k: int,
    activation: str,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype | None,
    other: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """A linear layer on int8 [N, K] or packed int4 weights as a function of x and the residual. other: the same for
    what ``takes`` refuses.
    """

    def make() -> Panels:
        return Panels(weight, weight_scale, weight_zero, bias, activation, group_size, k)

    def call(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return make()(x, residual) if takes(x.dtype, compute_dtype) else other(x, residual)

    def for_rows(shape: torch.Size, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        return make().for_rows(shape, dtype) if takes(dtype, compute_dtype) else call

    call.for_rows = for_rows  # type: ignore[attr-defined]
    return call
