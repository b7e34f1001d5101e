"""Linear layers by C kernels: weights repacked once, arguments in the order the kernels take them.

``prepare_...`` returns an operator of ``k`` columns as a function of x and the residual, for as long as nobody writes
into the tensors that it was given. x is float [..., K] of one of ``native.DTYPES``, the activation one of
``native.ACTIVATIONS``, no dimension 0. Raises RuntimeError with the reason where there are no C kernels.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.memory import scratch
from tilewright.kernels.dispatch.packed import packed
from tilewright.kernels.dispatch.problem import Problem

#: Bytes of quantised activations that are multiplied before the next rows are quantised.
_BLOCK_BYTES = 4 << 20
#: A multiple of the rows that a tile of the weight-only kernels takes, 12, and of those of AMX, 32.
_TILE_ROWS = 96
#: So many rows, or one more if that is odd, are one tile of the weight-only kernels, or several of two.
_FEW_ROWS = 6
#: Instruction sets whose kernels of float activations multiply nibbles less 8.
_LESS_8 = ("amx", "avx512_bf16", "avx512_vnni")
#: Below this many products a second thread costs more than it brings: they take one 2 to 5 us.
_GRAIN = 1 << 18
#: Scratch memory of up to so many bytes is on the stack.
_STACK_BYTES = 64 << 10
#: Up to so many activations every thread quantises all of them, rather than wait until others have done their part.
_OWN_ELEMENTS = 8192
#: How the threads of int8_linear and weight_only_linear share the work: as their enums.
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


def _rounded_up(count: int, to: int) -> int:
    return -(-count // to) * to


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous float32. The caller keeps it alive until the kernel has read it."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


#: What a C function of a linear layer takes after y, but for the threads: numbers, bytes of scratch areas, numbers.
_Rest = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Prepared:
    """A C function of a linear layer as one of x and the residual. ``for_rows`` is quicker, for x of one shape.

    weight: its arguments before x, whose tensors are kept alive. rest: those after y, of (rows, threads, dtype of x).
    """

    def __init__(
        self,
        name: str,
        n: int,
        k: int,
        weight: tuple[torch.Tensor | int | None, ...],
        activation: str,
        rest: Callable[[int, int, torch.dtype], _Rest],
    ):
        self._name, self._n, self._k, self._weight, self._rest = name, n, k, weight, rest
        self._function, self._activated = native.function(name), native.ACTIVATIONS[activation]
        self._before = tuple(each.data_ptr() if isinstance(each, torch.Tensor) else each for each in weight)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K], residual [..., N] or None -> [..., N] in the dtype of x."""
        rows = x if x.dim() == 2 else x.reshape(-1, self._k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        m, dtype = rows.shape[0], x.dtype
        y = torch.empty((*x.shape[:-1], self._n), dtype=dtype)
        if residual is not None:
            residual = residual.reshape(y.shape).to(dtype).contiguous()
        threads = self._threads(m)
        first, areas, last = self._rest(m, threads, dtype)
        self._function(
            *self._before,
            rows.data_ptr(),
            native.DTYPES[dtype],
            m,
            rows.stride(0),
            None if residual is None else residual.data_ptr(),
            self._activated,
            y.data_ptr(),
            *first,
            *[scratch((size,), torch.uint8, f"linear {place}").data_ptr() for place, size in enumerate(areas)],
            *last,
            threads,
        )
        return y

    def _threads(self, m: int) -> int:
        return torch.get_num_threads() if m * self._n * self._k >= _GRAIN else 1

    def for_rows(self, shape: torch.Size, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """The same for x of this shape and dtype, by a call whose arguments were put in place before."""
        m = math.prod(shape[:-1])
        threads = self._threads(m)
        first, areas, last = self._rest(m, threads, dtype)
        given = (*self._before, native.DTYPES[dtype], m, self._k, self._activated, *areas, *first, *last, threads)
        numbers = (ctypes.c_int64 * len(given))(*[each or 0 for each in given])
        function, address = native.function(f"call_{self._name}"), ctypes.addressof(numbers)
        held = sum(areas) + 64 * (len(areas) + 1)
        area = ((held,), torch.uint8, "linear") if held > _STACK_BYTES else None
        empty, like = _empty(*shape[:-1], self._n, dtype=dtype)
        # Looked up here, once: what a call looks up is a good part of the time it takes.
        threads_now, other = torch.get_num_threads, self.__call__

        def call(x: torch.Tensor, residual: torch.Tensor | None = None, kept: object = numbers) -> torch.Tensor:
            if residual is not None or not x.is_contiguous() or (threads > 1 and threads_now() != threads):
                return other(x, residual)
            y = empty(like)
            function(address, x.data_ptr(), y.data_ptr(), None if area is None else scratch(*area).data_ptr())
            return y

        #: For ``dispatch.repeated``: contiguous x alone, and so many threads.
        given_scratch = None if area is None else lambda: scratch(*area).data_ptr()
        call.fixed = threads, _address_of(function), address, empty, like, given_scratch  # type: ignore[attr-defined]
        return call


def _address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _empty(*sizes: int, dtype: torch.dtype) -> tuple[Callable[[Any], torch.Tensor], Any]:
    """(function, its argument) that return a new contiguous tensor: quicker than ``torch.empty`` with all of it."""
    with torch.inference_mode(False):
        like = torch.empty(1, dtype=dtype).expand(sizes)
    if torch.empty_like(like).is_contiguous():
        return torch.empty_like, like
    return functools.partial(torch.empty, dtype=dtype), sizes


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    panel = native.function("panel")()
    # Both are read with whole vectors: torch aligns memory to 64 bytes.
    values = torch.empty(native.function("int8_packed_bytes")(n, k), dtype=torch.int8)
    correction = torch.empty(-(-n // panel) * panel, dtype=torch.int32)
    weight = weight.contiguous()
    native.function("int8_pack")(weight.data_ptr(), n, k, values.data_ptr(), correction.data_ptr())
    return values, correction


def packed_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` int8 [N, K] in the order of int8_linear.c and its correction, made once for as long as it lives
    unchanged.
    """
    return packed(weight, native.layout("int8"), lambda: _pack_int8(weight))


def prepare_int8(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    channel_scale: torch.Tensor | None,
    k: int,
) -> Prepared:
    """``int8_linear``."""
    n = len(weight)
    packed_weight = packed_int8(weight)
    fixed = (*packed_weight, n, k, weight_scale.contiguous(), _floats(bias), _floats(channel_scale))
    stride, scratch_rows = native.function("int8_row_bytes")(k), native.function("int8_rows")

    def rest(m: int, threads: int, dtype: torch.dtype) -> _Rest:
        if m * k <= _OWN_ELEMENTS:
            sharing, block = _ALL, m
        elif n * stride <= _CACHED_WEIGHT and m >= _ROWS_FOR_EACH * threads:
            sharing, block = _ROWS, _ROWS_AT_ONCE
        else:
            sharing, block = _TOGETHER, min(m, max(1, _BLOCK_BYTES // stride))
        parts = 1 if sharing == _TOGETHER else threads
        return (), (parts * scratch_rows(block) * stride, parts * block * 4), (block, sharing)

    return Prepared("int8_linear", n, k, fixed, activation, rest)


def _packed_groups(
    name: str,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    k: int,
    sizes: tuple[int, int],
    *bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(values, scales, zero points) of a weight with scales for groups of columns, by the C function ``name``. sizes:
    bytes of the values, number of scales.
    """

    def pack() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        zero = torch.empty(sizes[1], dtype=torch.uint8) if weight.dtype == torch.int32 else None
        made = torch.empty(sizes[0], dtype=torch.uint8), torch.empty(sizes[1]), zero
        zeros = None if weight_zero is None else weight_zero.contiguous()
        given = weight.contiguous(), weight_scale.float().contiguous(), zeros
        n = len(weight)
        native.function(name)(*bits, *map(_address, given), n, k, weight_scale.numel() // n, *map(_address, made))
        return made

    return packed(weight, native.layout(f"{name} {k}"), pack, weight_scale, weight_zero)


def why_no_int4_groups(k: int, group_size: int) -> str | None:
    """Why the int4 kernels cannot read groups of this many of ``k`` columns, or None."""
    return (
        f"takes groups of a multiple of 8 columns, not of {group_size}" if group_size < k and group_size % 8 else None
    )


def packed_int4(
    weight_packed: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """An int4 weight of K columns in the order of int4_int8_linear.c, its scales and zero points, made once for as long
    as it lives unchanged.
    """
    n, groups = weight_scale.shape
    sizes = native.function("int4_packed_bytes")(n, k), native.function("int4_scales")(n, groups)
    return _packed_groups("int4_pack", weight_packed, weight_scale, weight_zero, k, sizes)


def prepare_int4_int8(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    activation: str,
    channel_scale: torch.Tensor | None,
    k: int,
) -> Prepared:
    """``int4_int8_linear``."""
    n, groups = weight_scale.shape
    packed_weight = packed_int4(weight_packed, weight_scale, weight_zero, k)
    fixed = (*packed_weight, n, k, group_size, _floats(bias), _floats(channel_scale))
    stride = native.function("int4_int8_row_bytes")(k)

    def rest(m: int, threads: int, dtype: torch.dtype) -> _Rest:
        own = m * k <= _OWN_ELEMENTS
        block = m if own else min(m, max(1, _BLOCK_BYTES // stride))
        held = block * threads if own else block
        return (), (held * stride, held * groups * 4, held * 4), (block, own)

    return Prepared("int4_int8_linear", n, k, fixed, activation, rest)


def why_not_weight_only(problem: Problem) -> str | None:
    """Why no C kernel of float activations takes the problem, or None."""
    if problem.multiply_dtype not in native.DTYPES:
        return f"does not multiply in {problem.multiply_dtype}"
    return why_not(problem)


def packed_weight_only(
    stored: torch.Tensor, weight_scale: torch.Tensor, weight_zero: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """An int8 or int4 weight of K columns in the order of weight_only.c, its scales and zero points (None of int8),
    made once for as long as it lives unchanged.
    """
    panel, bits, n = native.function("panel")(), 8 if stored.dtype == torch.int8 else 4, len(stored)
    channels = _rounded_up(n, panel)
    sizes = channels * -(-k // 8) * bits, channels * (weight_scale.numel() // n)
    return _packed_groups("weight_only_pack", stored, weight_scale, weight_zero, k, sizes, bits)


def zeros_that_count(packed_zero: torch.Tensor | None, weight_zero: torch.Tensor | None) -> torch.Tensor | None:
    """The zero points that weight_only.c is to be given: with AVX-512 none where every one is 8."""
    return None if weight_zero is None and native.isa() in _LESS_8 else packed_zero


def weight_only_scratch(compute: int, m: int, block: int, k: int, group_size: int) -> tuple[int, int]:
    """Bytes of what ``block`` of m rows, multiplied in the dtype of the number ``compute``, are converted to, and of
    their sums in each group.
    """
    held = block + block % 2 if block <= _FEW_ROWS else max(_rounded_up(block, 12), _rounded_up(block, 32))
    groups = -(-k // min(group_size, k))
    return held * native.function("weight_only_row_bytes")(compute, m, k, group_size), block * groups * 4


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
) -> Prepared:
    """``int8_weight_only_linear`` (of ``weight``) or ``int4_linear`` (of ``weight_packed``). Scales are applied to the
    sums of each group, in float32.
    """
    stored = weight_packed if weight is None else weight
    if stored is None:
        raise ValueError("a weight is missing")
    group_size = group_size or k
    row_bytes_of = native.function("weight_only_row_bytes")
    bits, n = 8 if stored.dtype == torch.int8 else 4, len(stored)
    packed_weight = packed_weight_only(stored, weight_scale, weight_zero, k)

    def rest(m: int, threads: int, dtype: torch.dtype) -> _Rest:
        compute = native.DTYPES[compute_dtype or dtype]
        row_bytes = row_bytes_of(compute, m, k, group_size)
        block = min(m, max(_TILE_ROWS, _BLOCK_BYTES // row_bytes // _TILE_ROWS * _TILE_ROWS))
        areas = weight_only_scratch(compute, m, block, k, group_size)
        sharing = _TOGETHER
        if m * k <= _OWN_ELEMENTS:
            sharing, areas = _ALL, (areas[0] * threads, areas[1] * threads)
        elif m == block and m >= _ROWS_FOR_EACH * threads and n * k * bits <= 8 * _CACHED_WEIGHT:
            # Tiles of AMX take a weight that every thread widens for itself longer: 0.85 at 768 x 768 and 512 rows.
            sharing = _TOGETHER if native.isa() == "amx" else _ROWS
        return (compute,), areas, (block, sharing)

    values, scales, zeros = packed_weight
    fixed = (bits, values, scales, zeros_that_count(zeros, weight_zero), n, k, group_size, _floats(bias))
    return Prepared("weight_only_linear", n, k, fixed, activation, rest)
