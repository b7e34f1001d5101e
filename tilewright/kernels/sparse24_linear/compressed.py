"""A few float32 rows times a 2:4 weight by the C kernel that reads the compressed form, on a CPU.

The weight is never unpacked in memory: masks of 16 columns and the kept values are put into the kernel's order once
(``kernels.dispatch.packed``) and take a little more than half of the bytes of the dense weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tilewright.kernels.cpu import native
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.formats import sparse24
from tilewright.kernels.sparse24_linear import cpu

#: Rows up to which reading the compressed weight beats a dense float32 product (384 x 384 to 4096 x 4096, two threads).
MOST_ROWS = 24
#: It beats oneDNN's product in bfloat16, of twice the rate, up to so many rows, and up to so many products.
_ROWS_BY_BFLOAT16, _PRODUCTS_BY_BFLOAT16 = 3, 5 << 19
#: Below this many products a second thread costs more than it brings.
_GRAIN = 1 << 18
#: Columns of a mask, and groups of four in them; as sparse24.c has them.
_COLUMNS, _GROUPS = 16, 4
_MULTIPLIED = (torch.float32, torch.bfloat16, torch.float16)


class Weight(ctypes.Structure):
    """``sparse24_weight`` of sparse24.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "masks", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
        *((name, ctypes.c_int32) for name in ("format", "activation")),
    ]


def why_not(problem: Problem) -> str | None:
    """Why the C kernel does not take the problem, or does not pay, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if problem.x_dtype != torch.float32:
        return f"takes rows in float32, not {problem.x_dtype}"
    if problem.multiply_dtype not in _MULTIPLIED:
        return f"does not multiply in {problem.multiply_dtype}"
    if problem.m > MOST_ROWS:
        return f"beyond {MOST_ROWS} rows a dense product is faster"
    if (
        problem.m > _ROWS_BY_BFLOAT16
        and problem.m * problem.n * problem.k > _PRODUCTS_BY_BFLOAT16
        and cpu.why_not(problem) is None
    ):
        return f"beyond {_ROWS_BY_BFLOAT16} rows and {_PRODUCTS_BY_BFLOAT16} products oneDNN's in bfloat16 is faster"
    if problem.activation not in native.ACTIVATIONS:
        return f"does not have the activation {problem.activation}"
    return native.why_no_native() or (
        None if native.function("sparse24_channels")() else f"is not built for {native.isa()}"
    )


def _pack(values: torch.Tensor, meta: torch.Tensor, k: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, masks int16) in the order of sparse24.c; values [N, 2 G] in bfloat16 or float32."""
    n, steps = len(values), -(-k // _COLUMNS)
    panels = -(-n // channels)
    rows = panels * channels - n
    bits = (1 << sparse24.unpack_places(meta, k)).sum(-1)
    bits = F.pad(bits, (0, steps * _GROUPS - bits.shape[1], 0, rows)).view(panels, channels, steps, _GROUPS)
    masks = (bits << torch.arange(0, _COLUMNS, _COLUMNS // _GROUPS)).sum(-1).to(torch.int16)
    kept = F.pad(values, (0, steps * _COLUMNS // 2 - values.shape[1], 0, rows))
    if values.dtype == torch.bfloat16:
        kept = kept.view(panels, channels // 2, 2, steps, _COLUMNS // 2).permute(0, 3, 1, 4, 2).flip(-1)
    else:
        kept = kept.view(panels, channels, steps, _COLUMNS // 2).permute(0, 2, 1, 3)
    return kept.contiguous(), masks.permute(0, 2, 1).contiguous()


def _rounded(values: torch.Tensor, compute_dtype: torch.dtype | None) -> torch.Tensor:
    """Values as they are multiplied, in the narrower of the two formats of the kernel that holds them."""
    narrow = compute_dtype or torch.float32
    exact = values.dtype == torch.bfloat16 and narrow == torch.float32
    values = values if exact else values.to(narrow)
    return values if values.dtype == torch.bfloat16 else values.float()


def prepare_float(
    weight_values: torch.Tensor,
    weight_meta: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    compute_dtype: torch.dtype | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``sparse24_linear`` of ``k`` columns as a function of x and the residual, for as long as nobody writes into the
    tensors given here. Raises RuntimeError where the kernel is not built.
    """
    run, panel, n = native.function("sparse24_linear"), native.function("sparse24_channels")(), len(weight_values)
    if not panel:
        raise RuntimeError(f"sparse24.c is not built for {native.isa()}")
    values, masks = packed(
        weight_values,
        native.layout(f"2:4 compressed, {k} columns, in {compute_dtype}"),
        lambda: _pack(_rounded(weight_values, compute_dtype), weight_meta, k, panel),
        weight_meta,
    )
    floats = None if bias is None else bias.detach().float().contiguous()
    pointers = (values.data_ptr(), masks.data_ptr(), None if floats is None else floats.data_ptr())
    weight = Weight(*pointers, n, k, native.DTYPES[values.dtype], native.ACTIVATIONS[activation])
    address, kept = ctypes.addressof(weight), (weight, values, masks, floats)

    def call(x: torch.Tensor, residual: torch.Tensor | None = None, kept: object = kept) -> torch.Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        m = rows.shape[0]
        y = torch.empty((*x.shape[:-1], n))
        if residual is not None:
            residual = residual.reshape(y.shape).float().contiguous()
        threads = torch.get_num_threads() if m * n * k >= _GRAIN else 1
        extra = None if residual is None else residual.data_ptr()
        run(address, rows.data_ptr(), m, rows.stride(0), extra, y.data_ptr(), threads)
        return y

    return call
