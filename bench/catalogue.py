"""Every Triton kernel of the package with the configurations that it is launched with.

A ``Family`` knows how the arguments of an operator become launches. ``launches_for`` makes those that the heuristics
choose on a target for a range of problems, over tensors without memory: they are compiled ahead of time.
``Family.plan`` over real tensors makes launches to emulate or to run, with any configuration.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.counts import Small
from bench.problems import QUANTIZERS, Shape, make_arguments
from tilewright.aot.launch import Launch
from tilewright.aot.specialize import specialize
from tilewright.aot.targets import Target
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.int4_int8_linear import triton_fused as int4_int8_fused
from tilewright.kernels.int4_int8_linear.triton_fused import Int4Int8Config
from tilewright.kernels.int4_linear import fragments as int4_fragment_order
from tilewright.kernels.int4_linear import triton_dequantize
from tilewright.kernels.int4_linear import triton_fragments as int4_fragments
from tilewright.kernels.int4_linear import triton_fused as int4_fused
from tilewright.kernels.int8_linear import triton_swapped as int8_swapped
from tilewright.kernels.int8_linear import triton_tile as int8_tile
from tilewright.kernels.int8_weight_only_linear import triton_dequantize as int8_dequantize
from tilewright.kernels.int8_weight_only_linear import triton_swapped as int8_weight_only_swapped
from tilewright.kernels.norm_quantize import triton_norm_quantize
from tilewright.kernels.quantize import triton_quantize
from tilewright.kernels.quantize.reference import quantize_per_row
from tilewright.kernels.sparse24_linear import layout as sparse24_layout
from tilewright.kernels.sparse24_linear import triton_fragments as sparse24_fragments
from tilewright.kernels.sparse24_linear import triton_unpack as sparse24_unpack
from tilewright.kernels.sparse24_linear.fragments import fragment_order
from tilewright.kernels.triton import int4_dequantize
from tilewright.kernels.triton.row_quantize import QuantizeConfig
from tilewright.kernels.triton.spans import kernel_order
from tilewright.kernels.triton.tiles import plan_span_product

Arguments = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]

#: Multiprocessors of a chip of each target: A100, L40S, H200, B200, MI300X. The heuristics count them.
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class Family:
    """The kernels of one implementation of one operator.

    name: folder and file. op: the operator whose arguments ``plan_with`` takes, with the outputs to fill, a config and
    whether to use inline PTX. configs, why_not, choose: the implementation's CONFIGS and functions of a ``Problem``.
    allocate: outputs for the arguments, poisoned.
    """

    name: str
    op: str
    configs: list[Any]
    choose: Callable[[Problem], Any]
    why_not: Callable[[Problem], str | None]
    plan_with: Callable[[Arguments, Outputs, Any, bool], list[Launch]]
    allocate: Callable[[Arguments], Outputs]

    def plan(self, arguments: Arguments, config: Any, inline_ptx: bool = True) -> tuple[list[Launch], Outputs]:
        """Launches for 2-D ``arguments``, and the outputs they fill: NaN, or -128, until then."""
        outputs = self.allocate(arguments)
        return self.plan_with(arguments, outputs, config, inline_ptx), outputs

    def problem(self, shape: Shape, target: Target) -> Problem:
        """The problem that ``shape`` poses on ``target``."""
        major, minor = divmod(int(target.arch), 10) if target.backend == "cuda" else (0, 0)
        return Problem(
            self.op,
            m=shape.m,
            n=shape.n,
            k=shape.k,
            x_dtype=torch.int8 if self.op == "int8_linear_quantized" else shape.dtype,
            device="cuda",
            capability=(major, minor) if target.backend == "cuda" else None,
            gpu_arch=str(target.arch) if target.backend == "hip" else None,
            multiprocessors=MULTIPROCESSORS[target.name],
            group_size=shape.group_size or shape.k,
            symmetric=shape.symmetric,
            scale_dtype=shape.dtype,
            compute_dtype=shape.compute_dtype,
            activation=shape.activation,
            bias=shape.bias,
            residual=shape.residual,
        )


@dataclass(frozen=True)
class OneConfig:
    """Of a kernel that is launched in one way."""


def _rows_and_scales(a: Arguments) -> Outputs:
    x = a["x"]
    return x.new_full(x.shape, -128, dtype=torch.int8), x.new_full(x.shape[:1], torch.nan, dtype=torch.float32)


def _result(a: Arguments) -> Outputs:
    weight = a[next(name for name in ("weight", "weight_packed", "weight_values") if name in a)]
    return (
        torch.full((len(a["x"]), len(weight)), torch.nan, dtype=a.get("out_dtype", a["x"].dtype), device=weight.device),
    )


def _dense_weight(a: Arguments) -> Outputs:
    packed = a["weight_packed"]
    dtype = a["compute_dtype"] or a["x"].dtype
    return (torch.full((len(packed), 8 * packed.shape[1]), torch.nan, dtype=dtype, device=packed.device),)


def _wide_weight(a: Arguments) -> Outputs:
    dtype = a["compute_dtype"] or a["x"].dtype
    return (torch.full(a["weight"].shape, torch.nan, dtype=dtype, device=a["weight"].device),)


def _end(a: Arguments) -> Arguments:
    return {name: a[name] for name in ("bias", "residual", "activation")}


def _plan_quantize(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    return triton_quantize.plan_quantize_per_row(a["x"], a["channel_scale"], *out, config)


def _plan_norm(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    layer = "bias" in a
    return triton_norm_quantize.plan_norm_quantize(
        a["x"], a["weight"], a.get("bias"), 1e-5 if layer else 1e-6, layer, *out, config
    )


def _plan_int8(plan: Callable[..., list[Launch]]) -> Callable[[Arguments, Outputs, Any, bool], list[Launch]]:
    def plan_with(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
        return plan(*(a[name] for name in ("x", "x_scale", "weight", "weight_scale")), *out, config, **_end(a))

    return plan_with


def _plan_int8_weight_only(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    operands = (a[name] for name in ("x", "weight", "weight_scale"))
    compute_dtype = a["compute_dtype"] or a["x"].dtype
    return int8_weight_only_swapped.plan_swapped(*operands, compute_dtype, *out, config, **_end(a))


def _plan_widen(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    return [int8_dequantize.plan_widen(a["weight"], *out)]


def _plan_dequantize(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    weight = (a[name] for name in ("weight_packed", "weight_scale", "weight_zero"))
    return int4_dequantize.plan_dequantize(*weight, *out, first_row=0, group_size=a["group_size"], config=config)


def _span_weight(a: Arguments) -> Any:
    return kernel_order(a["weight_packed"], a["weight_scale"], a["weight_zero"], a["group_size"], a["x"].shape[1])


def _plan_int4(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    how = (a["compute_dtype"] or a["x"].dtype, config, inline_ptx)
    return plan_span_product(int4_fused.int4_linear_kernel, a["x"], None, _span_weight(a), *out, *how, **_end(a))


def _plan_int4_fragments(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    weight = (a[name] for name in ("weight_packed", "weight_scale", "weight_zero", "group_size"))
    order = int4_fragment_order.fragment_order(*weight, a["x"].shape[1], a["compute_dtype"] or a["x"].dtype)
    return int4_fragments.plan_fragments(a["x"], order, *out, config=config, inline_ptx=inline_ptx, **_end(a))


def _plan_int4_int8(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
    q, scale = quantize_per_row(a["x"])
    how = (torch.int8, config, inline_ptx)
    return plan_span_product(int4_int8_fused.int4_int8_linear_kernel, q, scale, _span_weight(a), *out, *how, **_end(a))


def _step_weight(a: Arguments) -> Any:
    k, values, meta = a["x"].shape[1], a["weight_values"], a["weight_meta"]
    if "group_size" in a:
        scales = (a["weight_scale"], a["weight_zero"], a["group_size"])
        return sparse24_layout.int4_order(values, meta, *scales, k)
    dtype = torch.int8 if "weight_scale" in a else a["compute_dtype"] or a["x"].dtype
    return sparse24_layout.step_order(values, meta, k, dtype)


def _fragment_weight(a: Arguments) -> Any:
    is_int8 = a["weight_values"].dtype == torch.int8
    dtype = torch.int8 if is_int8 else a["compute_dtype"] or a["x"].dtype
    return fragment_order(a["weight_values"], a["weight_meta"], a["x"].shape[1], dtype)


def _sparse24_family(name: str, op: str, module: Any, config: Any, plan: Callable, order: Callable) -> Family:
    """What the kernel can compute, whether or not it pays there."""
    plan_with = _plan_sparse24(plan, order)
    return Family(name, op, list(module.CONFIGS), config.for_problem, module.why_cannot, plan_with, _result)


def _plan_sparse24(plan: Callable[..., list[Launch]], order: Callable[[Arguments], Any]) -> Callable[..., list[Launch]]:
    def plan_with(a: Arguments, out: Outputs, config: Any, inline_ptx: bool) -> list[Launch]:
        x, scales, dtype = a["x"], {}, a.get("compute_dtype") or a["x"].dtype
        if a["weight_values"].dtype == torch.int8:
            x, x_scale = quantize_per_row(x)
            scales, dtype = {"x_scale": x_scale, "w_scale": a["weight_scale"]}, torch.int8
        options = {"compute_dtype": dtype, "config": config, "inline_ptx": inline_ptx, **scales}
        return plan(x, order(a), *out, **options, **_end(a))

    return plan_with


def _family(name: str, op: str, module: Any, config: Any, plan_with: Callable, allocate: Callable = _result) -> Family:
    return Family(name, op, list(module.CONFIGS), config.for_problem, module.why_not, plan_with, allocate)


_NORM = (triton_norm_quantize, QuantizeConfig, _plan_norm, _rows_and_scales)
_INT8_SWAPPED = (int8_swapped, int8_swapped.SwappedConfig, _plan_int8(int8_swapped.plan_swapped))
_INT8_TILE = (int8_tile, int8_tile.TileConfig, _plan_int8(int8_tile.plan_tile))
_INT8_WEIGHT_ONLY = (int8_weight_only_swapped, int8_weight_only_swapped.SwappedConfig, _plan_int8_weight_only)
_DEQUANTIZE = (triton_dequantize, int4_dequantize.DequantizeConfig, _plan_dequantize, _dense_weight)
_INT4_FRAGMENTS = (int4_fragments, int4_fragments.FragmentConfig, _plan_int4_fragments)
_SPARSE24_UNPACK = (sparse24_unpack, sparse24_unpack.UnpackConfig, sparse24_unpack.plan_unpack, _step_weight)
_SPARSE24_FRAGMENTS = (
    sparse24_fragments,
    sparse24_fragments.FragmentConfig,
    sparse24_fragments.plan_fragments,
    _fragment_weight,
)
FAMILIES = (
    _family("quantize", "quantize_per_row", triton_quantize, QuantizeConfig, _plan_quantize, _rows_and_scales),
    _family("norm_quantize rms", "rms_norm_quantize", *_NORM),
    _family("norm_quantize layer", "layer_norm_quantize", *_NORM),
    _family("int8_linear swapped", "int8_linear_quantized", *_INT8_SWAPPED),
    _family("int8_linear tile", "int8_linear_quantized", *_INT8_TILE),
    _family("int8_weight_only_linear swapped", "int8_weight_only_linear", *_INT8_WEIGHT_ONLY),
    Family(
        "int8_weight_only_linear widen",
        "int8_weight_only_linear",
        [OneConfig()],
        lambda problem: OneConfig(),
        int8_dequantize.why_not,
        _plan_widen,
        _wide_weight,
    ),
    _family("int4_linear dequantize", "int4_linear", *_DEQUANTIZE),
    _family("int4_linear fused", "int4_linear", int4_fused, int4_fused.FusedConfig, _plan_int4),
    _family("int4_linear mma.sync", "int4_linear", *_INT4_FRAGMENTS),
    *(_sparse24_family(f"{op} unpacked", op, *_SPARSE24_UNPACK) for op in sparse24_unpack.KINDS),
    _sparse24_family("sparse24_linear mma.sp", "sparse24_linear", *_SPARSE24_FRAGMENTS),
    _sparse24_family("sparse24_int8_linear mma.sp", "sparse24_int8_linear", *_SPARSE24_FRAGMENTS),
    _family("int4_int8_linear fused", "int4_int8_linear", int4_int8_fused, Int4Int8Config, _plan_int4_int8),
)

_BATCHES = (1, 32, 64, 128, 256, 4096)
_FEATURES = ((4096, 4096), (28672, 4096))


def _shapes(op: str) -> Iterator[tuple[str, Shape]]:
    """Named problems. "ragged" ones are multiples of nothing: no 16-byte load is to be expected there."""
    full = {"bias": True, "residual": True, "activation": "gelu"}
    if op.endswith("_quantize") or op == "quantize_per_row":
        for k in (64, 512, 2048, 4096, 16384, 28672):
            yield "bf16", Shape(1024, 0, k)
        yield "fp16", Shape(1024, 0, 4096, torch.float16)
        yield "fp32", Shape(1024, 0, 4096, torch.float32)
        yield "bf16 ragged", Shape(77, 0, 1001)
        return
    groups: tuple[tuple[str, dict[str, Any]], ...] = (("", {}),)
    ragged: dict[str, Any] = {}
    if op.startswith("int4"):
        groups = (
            (" g128", {"group_size": 128}),
            (" g32 zero", {"group_size": 32, "symmetric": False}),
            (" row", {}),
        )
        ragged = {"group_size": 32, "symmetric": False}
    if op == "sparse24_int4_linear":
        groups = ((" g128", {"group_size": 128}), (" g256 zero", {"group_size": 256, "symmetric": False}), (" row", {}))
        ragged = {"group_size": 128, "symmetric": False}
    for group, options in groups:
        for n, k in _FEATURES:
            for m in _BATCHES:
                yield f"bf16{group}", Shape(m, n, k, torch.bfloat16, **options)
    for m in (16, 128, 4096):
        yield f"fp16{groups[0][0]} epilogue", Shape(m, 4096, 4096, torch.float16, **groups[0][1], **full)
    m = 16 if op == "int8_weight_only_linear" else 64  # which leaves more rows to a library
    yield f"fp32{groups[0][0]}", Shape(m, 4096, 4096, torch.float32, **groups[0][1])
    yield f"bf16{groups[min(1, len(groups) - 1)][0]} ragged", Shape(77, 1001, 1003, torch.bfloat16, **ragged, **full)


@dataclass(frozen=True)
class Entry:
    """One kernel to compile: its row in the table is named by family, kernel, variant and config.

    small: the same binary over a problem that is small enough to emulate, as ``counts.count`` takes it.
    """

    family: str
    kernel: str
    variant: str
    config: str
    launch: Launch
    small: Callable[[int], Small | None] = field(default=lambda depth: None, compare=False)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from the other entries of one target."""
        return self.family, self.kernel, self.variant, self.config


def describe(config: Any) -> str:
    """A config in one word for each field that says something."""
    values = dataclasses.asdict(config)
    return " ".join(f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in values.items())


def launches_for(target: Target) -> Iterator[Entry]:
    """Every kernel that the catalogue's problems need on ``target``, each variant and config once.

    Batches share a binary but for whether a count of tiles is 1 or divisible by 16: the first batch stands for all.
    """
    for family in FAMILIES:
        seen: set[tuple] = set()
        for variant, shape in _shapes(family.op):
            problem = family.problem(shape, target)
            if family.why_not(problem) is not None:
                continue
            config = family.choose(problem)
            arguments = make_arguments(family.op, shape, device="meta")
            launches, _ = family.plan(arguments, config, inline_ptx=target.backend == "cuda")
            for index, launch in enumerate(launches):
                small = functools.partial(_small_launch, family, shape, config, target, index)
                entry = Entry(family.name, launch.kernel.__name__, variant, describe(config), launch, small)
                binary = (entry.kernel, str(specialize(launch, target)), launch.num_warps, launch.num_stages)
                if entry.key not in seen and binary not in seen:
                    seen |= {entry.key, binary}
                    yield entry


def _small_launch(family: Family, shape: Shape, config: Any, target: Target, index: int, depth: int) -> Small | None:
    """The launch number ``index`` for a problem of few tiles with the specialisation that ``shape`` gives it, or None.

    depth: 1, or 2 for twice the columns of K.
    """

    def planned(size: Shape, device: str) -> Launch:
        launches, _ = family.plan(make_arguments(family.op, size, device), config)
        return launches[index]

    required = specialize(planned(shape, "meta"), target)
    for sizes in _small_shapes(family, shape, config):
        if all(specialize(planned(size, "meta"), target) == required for size in sizes):
            return Small(planned(sizes[depth - 1], "cpu"), sizes[depth - 1].k) if depth <= len(sizes) else None
    return None


def _small_shapes(family: Family, shape: Shape, config: Any) -> Iterator[tuple[Shape, ...]]:
    """Problems of one to 16 tiles each way, or 17 of rows, since parts of more than 256 are added up in larger blocks;
    as ragged as ``shape``. Products with some columns of K and with twice as many; last, where a count of steps is part
    of the specialisation, with one depth only.
    """
    if family.op in QUANTIZERS:
        rows = config.rows
        yield from ((replace(shape, m=m),) for m in (rows, 2 * rows, 16 * rows, 2 * rows + 1) if m <= shape.m)
        return
    block_m, block_n = getattr(config, "block_m", 16), getattr(config, "block_n", 64)
    splits = max(getattr(config, "split_k", 1), getattr(config, "splits", 1))
    # Ragged: a little more than whole steps, or as much less as ``shape``, with words and groups as divisible as its.
    short = -shape.k % 512
    odd = 11 if short else 0
    extras, tiles, lengths = dict.fromkeys((odd, -short)), (1, 2, 16), (512, 1024, 2048, 4096)
    for depths in (2, 1):
        for extra, tiles_m, tiles_n, length in itertools.product(extras, (*tiles, 17), tiles, lengths):
            m, n = min(shape.m, tiles_m * block_m - odd), tiles_n * block_n - odd
            yield tuple(
                replace(shape, m=m, n=n, k=k, group_size=None if shape.group_size is None else min(shape.group_size, k))
                for k in (depth * length * splits + extra for depth in range(1, depths + 1))
            )
    if shape.k < 2048:
        yield from ((replace(shape, m=min(shape.m, t * block_m - odd), n=t * block_n - odd),) for t in tiles)
