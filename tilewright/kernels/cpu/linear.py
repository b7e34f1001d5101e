"""Linear layers by C kernels: weights repacked once, arguments in the order the kernels take them.

Every function takes x float [..., K] of one of ``native.DTYPES`` and an activation of ``native.ACTIVATIONS``, wants all
dimensions above 0, and raises RuntimeError with the reason where there are no C kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.memory import scratch
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem

#: Bytes of quantised activations that are multiplied before the next rows are quantised.
_BLOCK_BYTES = 4 << 20
#: A multiple of the rows that a tile of the weight-only kernels takes, 12, and of those of AMX, 32.
_TILE_ROWS = 96
#: Below this many products a second thread costs more than it brings.
_GRAIN = 32768
#: Up to so many activations every thread quantises all of them, rather than wait until others have done their part.
_OWN_ELEMENTS = 8192
#: How the threads of int8_linear share the work: as its enum.
_TOGETHER, _ALL, _ROWS = range(3)
#: Bytes of a weight that stays in a core's second-level cache beside the rows that pass through.
_CACHED_WEIGHT = 768 << 10
#: Rows for each thread from which on threads take rows, and how many they take at once.
_ROWS_FOR_EACH, _ROWS_AT_ONCE = 24, 64


def why_not(problem: Problem) -> str | None:
    """Why no C kernel takes the problem, whatever its weight, or None."""
    if 0 in (problem.m, problem.n, problem.k):
        return "nothing to multiply"
    if problem.x_dtype not in native.DTYPES:
        return f"does not read {problem.x_dtype}"
    if problem.activation not in native.ACTIVATIONS:
        return f"does not have the activation {problem.activation}"
    return native.why_no_native()


def _kernel(name: str) -> Callable[..., int]:
    function = native.function(name)
    if function is None:
        raise RuntimeError(native.why_no_native())
    return function


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous float32. The caller keeps it alive until the kernel has read it."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def _residual(residual: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """[M, N], contiguous, in the dtype of the result."""
    if residual is None:
        return None
    return residual.reshape(like.shape).to(like.dtype).contiguous()


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """[M, K] with columns side by side, M, K."""
    shape = x.shape
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.shape[0], shape[-1]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(products: int) -> int:
    return torch.get_num_threads() if products >= _GRAIN else 1


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    panel = _kernel("panel")()
    # Both are read with whole vectors: torch aligns memory to 64 bytes.
    values = torch.empty(_kernel("int8_packed_bytes")(n, k), dtype=torch.int8)
    correction = torch.empty(-(-n // panel) * panel, dtype=torch.int32)
    weight = weight.contiguous()
    _kernel("int8_pack")(weight.data_ptr(), n, k, values.data_ptr(), correction.data_ptr())
    return values, correction


def prepare_int8(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    channel_scale: torch.Tensor | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``int8_linear`` of ``k`` columns as a function of x and the residual, for as long as nobody writes into the
    tensors given here.
    """
    function, n = _kernel("int8_linear"), len(weight)
    values, correction = packed(weight, native.layout("int8"), lambda: _pack_int8(weight))
    weight_scale, bias, channel_scale = weight_scale.contiguous(), _floats(bias), _floats(channel_scale)
    fixed = (values.data_ptr(), correction.data_ptr(), n, k, weight_scale.data_ptr(), _address(bias))
    channels, activated, stride = _address(channel_scale), native.ACTIVATIONS[activation], _kernel("int8_row_bytes")(k)
    scratch_rows = _kernel("int8_rows")
    kept = (values, correction, weight_scale, bias, channel_scale)

    def call(x: torch.Tensor, residual: torch.Tensor | None = None, kept: object = kept) -> torch.Tensor:
        rows, m, _ = _rows(x)
        y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
        residual = _residual(residual, y)
        threads = _threads(m * n * k)
        if m * k <= _OWN_ELEMENTS:
            sharing, block = _ALL, m
        elif n * stride <= _CACHED_WEIGHT and m >= _ROWS_FOR_EACH * threads:
            sharing, block = _ROWS, _ROWS_AT_ONCE
        else:
            sharing, block = _TOGETHER, min(m, max(1, _BLOCK_BYTES // stride))
        parts = 1 if sharing == _TOGETHER else threads
        function(
            *fixed,
            channels,
            rows.data_ptr(),
            native.DTYPES[x.dtype],
            m,
            rows.stride(0),
            _address(residual),
            activated,
            y.data_ptr(),
            scratch((parts * scratch_rows(block) * stride,), torch.uint8, "quantized").data_ptr(),
            scratch((parts * block,), torch.float32, "row scale").data_ptr(),
            block,
            sharing,
            threads,
        )
        return y

    return call


def _pack_int4(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, groups = weight_scale.shape
    values = torch.empty(_kernel("int4_packed_bytes")(n, k), dtype=torch.uint8)
    count = _kernel("int4_scales")(n, groups)
    scale, zero = torch.empty(count), torch.empty(count, dtype=torch.uint8)
    words, floats = weight_packed.contiguous(), weight_scale.float().contiguous()
    zeros = None if weight_zero is None else weight_zero.contiguous()
    _kernel("int4_pack")(
        words.data_ptr(),
        floats.data_ptr(),
        _address(zeros),
        n,
        k,
        groups,
        values.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
    )
    return values, scale, zero


def why_no_int4_groups(k: int, group_size: int) -> str | None:
    """Why the int4 kernels cannot read groups of this many of ``k`` columns, or None."""
    return (
        f"takes groups of a multiple of 8 columns, not of {group_size}" if group_size < k and group_size % 8 else None
    )


def prepare_int4_int8(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    activation: str,
    channel_scale: torch.Tensor | None,
    k: int,
) -> Callable[..., torch.Tensor]:
    """``int4_int8_linear`` of ``k`` columns as a function of x and the residual, for as long as nobody writes into the
    tensors given here.
    """
    function = _kernel("int4_int8_linear")
    n, groups = weight_scale.shape
    values, scale, zero = packed(
        weight_packed,
        native.layout(f"int4 {k}"),
        lambda: _pack_int4(weight_packed, weight_scale, weight_zero, k),
        weight_scale,
        weight_zero,
    )
    bias, channel_scale = _floats(bias), _floats(channel_scale)
    fixed = (values.data_ptr(), scale.data_ptr(), zero.data_ptr(), n, k, group_size, _address(bias))
    channels, activated = _address(channel_scale), native.ACTIVATIONS[activation]
    stride = _kernel("int4_int8_row_bytes")(k)
    kept = (values, scale, zero, bias, channel_scale)

    def call(x: torch.Tensor, residual: torch.Tensor | None = None, kept: object = kept) -> torch.Tensor:
        rows, m, _ = _rows(x)
        y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
        residual = _residual(residual, y)
        threads, own = _threads(m * n * k), m * k <= _OWN_ELEMENTS
        block = m if own else min(m, max(1, _BLOCK_BYTES // stride))
        held = block * threads if own else block
        function(
            *fixed,
            channels,
            rows.data_ptr(),
            native.DTYPES[x.dtype],
            m,
            rows.stride(0),
            _address(residual),
            activated,
            y.data_ptr(),
            scratch((held * stride,), torch.int8, "quantized").data_ptr(),
            scratch((held * groups,), torch.int32, "group sums").data_ptr(),
            scratch((held,), torch.float32, "row scale").data_ptr(),
            block,
            own,
            threads,
        )
        return y

    return call


def why_not_weight_only(problem: Problem) -> str | None:
    """Why no C kernel of float activations takes the problem, or None."""
    if problem.multiply_dtype not in native.DTYPES:
        return f"does not multiply in {problem.multiply_dtype}"
    return why_not(problem)


def _pack_weight_only(
    weight: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, bits: int, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    n, groups = len(weight), weight_scale.numel() // len(weight)
    panel = _kernel("panel")()
    channels = -(-n // panel) * panel
    values = torch.empty(channels * -(-k // 8) * bits, dtype=torch.uint8)
    scale = torch.empty(channels * groups)
    zero = torch.empty(channels * groups, dtype=torch.uint8) if bits == 4 else None
    weight, floats = weight.contiguous(), weight_scale.float().contiguous()
    zeros = None if weight_zero is None else weight_zero.contiguous()
    _kernel("weight_only_pack")(
        bits,
        weight.data_ptr(),
        floats.data_ptr(),
        _address(zeros),
        n,
        k,
        groups,
        values.data_ptr(),
        scale.data_ptr(),
        _address(zero),
    )
    return values, scale, zero


def prepare_weight_only(
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
    """``int8_weight_only_linear`` (of ``weight``) or ``int4_linear`` (of ``weight_packed``) of ``k`` columns as a
    function of x and the residual, for as long as nobody writes into the tensors given here. Scales are applied to the
    sums of each group, in float32.
    """
    stored = weight_packed if weight is None else weight
    if stored is None:
        raise ValueError("a weight is missing")
    group_size = group_size or k
    function, row_bytes_of = _kernel("weight_only_linear"), _kernel("weight_only_row_bytes")
    bits = 8 if stored.dtype == torch.int8 else 4
    n = len(stored)
    groups = weight_scale.numel() // n
    values, scale, zero = packed(
        stored,
        native.layout(f"weight only {k}"),
        lambda: _pack_weight_only(stored, weight_scale, weight_zero, bits, k),
        weight_scale,
        weight_zero,
    )
    bias = _floats(bias)
    fixed = (bits, values.data_ptr(), scale.data_ptr(), _address(zero), n, k, group_size, _address(bias))
    activated = native.ACTIVATIONS[activation]
    kept = (values, scale, zero, bias)

    def call(x: torch.Tensor, residual: torch.Tensor | None = None, kept: object = kept) -> torch.Tensor:
        rows, m, _ = _rows(x)
        y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
        residual = _residual(residual, y)
        compute = native.DTYPES[compute_dtype or x.dtype]
        row_bytes = row_bytes_of(compute, m, k, group_size)
        block = min(m, max(_TILE_ROWS, _BLOCK_BYTES // row_bytes // _TILE_ROWS * _TILE_ROWS))
        function(
            *fixed,
            rows.data_ptr(),
            native.DTYPES[x.dtype],
            compute,
            m,
            rows.stride(0),
            _address(residual),
            activated,
            y.data_ptr(),
            scratch(((block + _TILE_ROWS) * row_bytes,), torch.uint8, "rows").data_ptr(),
            scratch((block * groups,), torch.float32, "group sums").data_ptr(),
            block,
            _threads(m * n * k),
        )
        return y

    return call
