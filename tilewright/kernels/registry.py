"""The implementations that come with the package, in order of preference for each operator."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace

from tilewright.kernels.cpu import choices
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import Implementation, register, set_preference

_PACKAGE = "tilewright.kernels."
_FOLDERS = {
    "quantize_per_row": "quantize",
    "rms_norm_quantize": "norm_quantize",
    "layer_norm_quantize": "norm_quantize",
    "int8_linear": "int8_linear",
    "int8_linear_quantized": "int8_linear",
    "int8_weight_only_linear": "int8_weight_only_linear",
    "int4_linear": "int4_linear",
    "int4_int8_linear": "int4_int8_linear",
    "sparse24_linear": "sparse24_linear",
    "sparse24_int8_linear": "sparse24_linear",
    "sparse24_int4_linear": "sparse24_linear",
}
_SPARSE24 = f"{_PACKAGE}sparse24_linear."
UNPACKED = "unpacked once, then dense"
_CONV_FOLDERS = {
    "conv2d_fused": "conv2d",
    "sparse24_conv2d_fused": "sparse24_conv2d",
    "quantize_per_tensor": "int8_conv2d",
    "int8_conv2d_fused": "int8_conv2d",
}


def folder_of(op: str) -> str | None:
    """The folder of the implementations of ``op``, None for an operator that is not ours."""
    return (_FOLDERS | _CONV_FOLDERS | {"attention": "attention"}).get(op)


def _cpu(
    op: str,
    name: str,
    function: str | None = None,
    reason: str = "why_not",
    module: str = "cpu",
    prepare: str | None = None,
) -> None:
    """Register ``function`` (by default named like the operator) of a module in the operator's folder, which says
    itself what it does not take.
    """
    path = f"{_PACKAGE}{folder_of(op)}.{module}"

    def why_not(problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"runs on the CPU, not on {problem.device}"
        return getattr(importlib.import_module(path), reason)(problem)

    prepared = prepare and _PACKAGE + prepare
    register(Implementation(name, op, why_not, f"{path}:{function or op}", prepared))


def _gpu(op: str, name: str, module: str, folder: str | None = None) -> None:
    """Register the function named like the operator of a module that needs Triton."""
    path = f"{_PACKAGE}{folder or folder_of(op)}.{module}"

    def why_not(problem: Problem) -> str | None:
        # The module imports Triton, so it must not be touched where there is none.
        if problem.device != "cuda":
            return f"runs on a GPU, not on {problem.device}"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return importlib.import_module(path).why_not(problem)

    register(Implementation(name, op, why_not, f"{path}:{op}"))


def _always(problem: Problem) -> str | None:
    return None


def _why_not_unpacked(problem: Problem) -> str | None:
    return importlib.import_module(f"{_SPARSE24}dense").why_not(problem)


def _unpacked_problem(problem: Problem) -> Problem | None:
    found: Problem | None = importlib.import_module(f"{_SPARSE24}dense").handed_on(problem)
    return found


def _unpacked_convolution(problem: Problem) -> Problem:
    return replace(problem, op="conv2d_fused")


def register_all() -> None:
    """Called once, when the operators are defined."""
    _gpu("quantize_per_row", "Triton", "triton_quantize")
    _gpu("rms_norm_quantize", "Triton", "triton_norm_quantize")
    _gpu("layer_norm_quantize", "Triton", "triton_norm_quantize")
    for op in ("int8_linear", "int8_linear_quantized"):
        _gpu(op, "Triton, operands swapped", "triton_swapped")
        _gpu(op, "Triton, tiles", "triton_tile")
        if op == "int8_linear":
            _cpu(op, "C kernel", "native_int8_linear", "why_not_native", prepare="cpu.linear:prepare_int8")
        _cpu(op, "oneDNN")
        _cpu(op, "exact float32", f"float_{op}", "why_not_float")
    _gpu("int8_weight_only_linear", "Triton, operands swapped", "triton_swapped")
    _gpu("int8_weight_only_linear", "Triton, dequantise and multiply", "triton_dequantize")
    _gpu("int8_weight_only_linear", "dequantise and multiply", "dequantize")
    _gpu("int4_linear", "Triton, mma.sync", "triton_fragments")
    _gpu("int4_linear", "Triton, fused", "triton_fused")
    _gpu("int4_linear", "Triton, dequantise and multiply", "triton_dequantize")
    _gpu("int4_int8_linear", "Triton, dequantise and multiply", "triton_dequantize")
    _gpu("int4_int8_linear", "Triton, fused", "triton_fused")
    _cpu("quantize_per_row", "blocks of rows")
    prepare = "int8_weight_only_linear.cpu:prepare_native"
    _cpu("int8_weight_only_linear", "C kernel", "native_int8_weight_only_linear", "why_not_native", prepare=prepare)
    _cpu("int8_weight_only_linear", "ATen int8pack")
    _cpu("int8_weight_only_linear", "dequantised blocks", "dequantized_blocks", "why_not_blocks")
    prepare = "int4_linear.cpu:prepare_native"
    _cpu("int4_linear", "C kernel", "native_int4_linear", "why_not_native", prepare=prepare)
    _cpu("int4_linear", "ATen int4pack")
    _cpu("int4_linear", "dequantised blocks", "dequantized_blocks", "why_not_blocks")
    _cpu(
        "int4_int8_linear",
        "C kernel",
        "native_int4_int8_linear",
        "why_not_native",
        prepare="cpu.linear:prepare_int4_int8",
    )
    _cpu("int4_int8_linear", "oneDNN by group")
    register(
        Implementation(
            "dequantise and multiply", "int4_linear", _always, f"{_PACKAGE}int4_linear.dequantize:int4_linear"
        )
    )
    set_preference(choices.faster)
    for op in ("sparse24_linear", "sparse24_int8_linear", "sparse24_int4_linear"):
        if op != "sparse24_int4_linear":
            _gpu(op, "Triton, mma.sp", "triton_fragments")
        _gpu(op, "Triton, unpacked in registers", "triton_unpack")
        if op != "sparse24_int4_linear":
            _gpu(op, "cuSPARSELt", "cusparselt")
        kind = {"sparse24_linear": "float", "sparse24_int8_linear": "int8"}.get(op, "int4")
        if op == "sparse24_linear":
            _cpu(op, "C kernel, 2:4", module="compressed", prepare="sparse24_linear.compressed:prepare_float")
        if op != "sparse24_int8_linear":
            _cpu(op, "unpacked once for oneDNN", prepare=f"sparse24_linear.cpu:prepare_{kind}")
        register(
            Implementation(
                UNPACKED,
                op,
                _why_not_unpacked,
                f"{_SPARSE24}dense:{op}",
                f"{_SPARSE24}dense:prepare_{kind}",
                _unpacked_problem,
            )
        )
    for op, folder in _FOLDERS.items():
        # The definition itself: right everywhere, and slow.
        register(Implementation("reference", op, _always, f"{_PACKAGE}{folder}.reference:{op}"))


def register_convolutions() -> None:
    """Called once, when the convolutions are defined. One kernel of a family serves float and int8."""
    for op in ("conv2d_fused", "int8_conv2d_fused"):
        _gpu(op, "Triton, 1 x 1", "triton_pointwise", "conv2d")
        _gpu(op, "Triton, depthwise", "triton_depthwise", "conv2d")
        _gpu(op, "Triton, few channels", "triton_stem", "conv2d")
        _gpu(op, "Triton, implicit product", "triton_implicit", "conv2d")
    _gpu("quantize_per_tensor", "Triton", "triton_quantize")
    for op in ("conv2d_fused", "int8_conv2d_fused"):
        _cpu(op, "C")
        _cpu(op, "oneDNN", f"onednn_{op}", "why_not_onednn")
    _cpu("quantize_per_tensor", "C", reason="why_not_quantize")
    op = "sparse24_conv2d_fused"
    register(
        Implementation(UNPACKED, op, _always, f"{_PACKAGE}sparse24_conv2d.dense:{op}", handed_on=_unpacked_convolution)
    )
    for op, folder in _CONV_FOLDERS.items():
        register(Implementation("reference", op, _always, f"{_PACKAGE}{folder}.reference:{op}"))


def register_attention() -> None:
    """Called once, when the operator is defined."""
    _cpu("attention", "C kernel")
    for name, module in (("PyTorch", "pytorch"), ("reference", "reference")):
        register(Implementation(name, "attention", _always, f"{_PACKAGE}attention.{module}:attention"))
