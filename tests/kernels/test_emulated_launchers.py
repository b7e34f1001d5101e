"""Rung 5 for the launchers: whole operators called as on a GPU, with every launch emulated instead.

What the launchers do around their plans is in it: the config that the heuristic picks, layouts, leading dimensions,
allocation. Memory that ``torch.empty`` hands out is poisoned.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from bench.conv_problems import ConvShape, exact_before_rounding, make_conv_arguments
from bench.conv_problems import plain_result as plain_conv
from bench.problems import Shape, make_arguments
from tests.gpu.compare import check
from tests.kernels.exact_conv import assert_rounded
from tests.tolerance import assert_close_as_plain
from tilewright.aot import Launch, emulate_launch
from tilewright.kernels.conv2d import triton_launch
from tilewright.kernels.dispatch import problem
from tilewright.kernels.int4_int8_linear import triton_fused as int4_int8_fused
from tilewright.kernels.int4_linear import triton_fused as int4_fused
from tilewright.kernels.int8_conv2d.reference import quantize_per_tensor
from tilewright.kernels.sparse24_linear import triton_unpack

pytestmark = pytest.mark.aot
#: (operator, module, rows): each module at a number of rows that the router gives it.
LINEAR = (
    ("int8_linear_quantized", "int8_linear.triton_swapped", 5),
    ("int8_linear", "int8_linear.triton_swapped", 5),
    ("int8_linear", "int8_linear.triton_tile", 70),
    ("int8_weight_only_linear", "int8_weight_only_linear.triton_swapped", 19),
    ("int8_weight_only_linear", "int8_weight_only_linear.triton_dequantize", 70),
    ("int4_linear", "int4_linear.triton_fused", 9),
    ("int4_linear", "int4_linear.triton_dequantize", 70),
    ("int4_int8_linear", "int4_int8_linear.triton_fused", 9),
)
#: (operator, module, rows, columns): ``mma.sp`` takes units of 128 columns.
SPARSE = (
    ("sparse24_linear", "triton_fragments", 11, 384),
    ("sparse24_int8_linear", "triton_fragments", 5, 384),
    ("sparse24_linear", "triton_unpack", 19, 299),
    ("sparse24_int8_linear", "triton_unpack", 19, 299),
    ("sparse24_int4_linear", "triton_unpack", 9, 299),
)
CONVOLUTIONS = {
    "pointwise": ConvShape(2, 24, (7, 9), 41, stride=(2, 1)),
    "implicit": ConvShape(2, 18, (7, 5), 21, (3, 2), (3, 2), (1, 0, 2, 1), (2, 1), groups=3),
    "stem": ConvShape(2, 3, (17, 11), 40, 5, 2),
    "depthwise": ConvShape(2, 40, (7, 9), 40, 3, groups=40),
}


@pytest.fixture(params=["sm_80", "sm_90"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An emulated GPU under every launch; the names of the kernels launched."""
    launched: list[str] = []

    def run(launch: Launch) -> None:
        launched.append(launch.kernel.__name__)
        emulate_launch(launch, request.param, profile=False)

    monkeypatch.setattr(Launch, "run", run)
    # The heuristics see the chip, and remember what they saw for this device.
    chip = {"device": "cuda", "capability": divmod(int(request.param[3:]), 10), "multiprocessors": 132}
    monkeypatch.setitem(problem._device_facts, torch.device("cpu"), chip)
    triton_launch._problem.cache_clear()
    for module in (int4_fused, int4_int8_fused, triton_unpack):
        monkeypatch.setattr(module, "inline_ptx_by_default", lambda device: True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # poisons what torch.empty hands out
    yield launched
    triton_launch._problem.cache_clear()
    torch.use_deterministic_algorithms(before)


def launcher(module: str, op: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"tilewright.kernels.{module}"), op)


def spread(x: torch.Tensor) -> torch.Tensor:
    """``x`` [M, K] as [1, M, K], rows of a wider matrix."""
    rows, columns = x.shape
    wide = torch.zeros(rows, columns + 3, dtype=x.dtype)
    wide[:, :columns] = x
    return wide[:, :columns].unflatten(0, (-1, rows))


@pytest.mark.parametrize("op, module, rows", LINEAR, ids=lambda value: str(value))
def test_linear_operators(op: str, module: str, rows: int, gpu: list[str]) -> None:
    shape = Shape(rows, 75, 299, torch.bfloat16, group_size=32, symmetric=False, residual=True, activation="gelu")
    arguments = make_arguments(op, shape)
    given = {**arguments, "x": spread(arguments["x"]), "residual": arguments["residual"].t().contiguous().t()[None]}
    if "x_scale" in given:
        given["x_scale"] = given["x_scale"][None]
    y = launcher(module, op)(**given)
    assert y.shape == (1, rows, 75) and gpu
    check(op, y[0], arguments)


@pytest.mark.parametrize("op, module, rows, columns", SPARSE, ids=lambda value: str(value))
def test_sparse_operators(op: str, module: str, rows: int, columns: int, gpu: list[str]) -> None:
    shape = Shape(rows, 75, columns, torch.bfloat16, group_size=128, symmetric=False, residual=True, activation="gelu")
    arguments = make_arguments(op, shape)
    given = {**arguments, "x": spread(arguments["x"]), "residual": arguments["residual"].t().contiguous().t()[None]}
    y = launcher(f"sparse24_linear.{module}", op)(**given)
    assert y.shape == (1, rows, 75) and any("sparse24" in name for name in gpu)
    check(op, y[0], arguments)


@pytest.mark.parametrize("rows, columns, group_size", [(7, 320, 64), (3, 128, 128)])
def test_int4_in_fragment_order(rows: int, columns: int, group_size: int, gpu: list[str]) -> None:
    """Which takes only rows of a multiple of 64 columns, and scales of 16 bits."""
    shape = Shape(rows, 75, columns, torch.bfloat16, group_size=group_size, symmetric=False, residual=True)
    arguments = make_arguments("int4_linear", shape)
    given = {**arguments, "x": spread(arguments["x"]), "residual": arguments["residual"].t().contiguous().t()[None]}
    run = launcher("int4_linear.triton_fragments", "int4_linear")
    clean = run(**given)
    assert clean.shape == (1, rows, 75) and gpu[0] == "int4_fragment_kernel"
    check("int4_linear", clean[0], arguments)
    arguments["x"][1, 3], arguments["x"][2, 5] = torch.nan, torch.inf
    y = run(**{**given, "x": spread(arguments["x"])})
    assert not y[0, 1:3].isfinite().any()
    rest = [row for row in range(rows) if row not in (1, 2)]
    assert torch.equal(y[0, rest], clean[0, rest])


@pytest.mark.parametrize("op", ["quantize_per_row", "rms_norm_quantize", "layer_norm_quantize"])
def test_quantisers(op: str, gpu: list[str]) -> None:
    arguments = make_arguments(op, Shape(19, 0, 1001, torch.bfloat16))
    module = "quantize.triton_quantize" if op == "quantize_per_row" else "norm_quantize.triton_norm_quantize"
    q, scale = launcher(module, op)(**{**arguments, "x": spread(arguments["x"])})
    assert q.shape == (1, 19, 1001) and scale.shape == (1, 19) and gpu
    check(op, (q[0], scale[0]), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_convolutions(family: str, dtype: torch.dtype, gpu: list[str]) -> None:
    shape = ConvShape(**{**vars(CONVOLUTIONS[family]), "dtype": dtype, "residual": True, "activation": "hardswish"})
    arguments = make_conv_arguments(shape)
    given = {**arguments, "residual": arguments["residual"].contiguous()}  # its channels first
    y = launcher(f"conv2d.triton_{family}", shape.op)(**given)
    assert y.is_contiguous(memory_format=torch.channels_last) and gpu == [f"{family}_kernel"]
    exact = exact_before_rounding(shape.op, arguments)
    if dtype == torch.int8:
        assert_rounded(y, exact, arguments)
    else:
        assert_close_as_plain(y, plain_conv(arguments), exact)


@pytest.mark.parametrize("shape", [(2, 5, 9, 30), (3, 77), (7,)], ids=str)
def test_quantisation_per_tensor(shape: tuple[int, ...], gpu: list[str]) -> None:
    x = torch.randn(shape).bfloat16()
    q = launcher("int8_conv2d.triton_quantize", "quantize_per_tensor")(x, 0.017)
    assert gpu == ["quantize_per_tensor_kernel"]
    assert torch.equal(q, quantize_per_tensor(x, 0.017, torch.int8))
    x.view(-1)[-1] = torch.inf
    q, marks = launcher("int8_conv2d.triton_quantize", "quantize_per_tensor_marked")(x, 0.017, min(x.dim() - 1, 1))
    assert torch.equal(q, quantize_per_tensor(x, 0.017, torch.int8))
    assert marks.view(-1)[-1].isnan() and not marks.view(-1)[:-1].any()


@pytest.mark.parametrize("op, module, rows", LINEAR[1:], ids=lambda value: str(value))
def test_one_row_that_is_not_finite_stays_alone(op: str, module: str, rows: int, gpu: list[str]) -> None:
    arguments = make_arguments(op, Shape(rows, 40, 96, torch.float16, group_size=32))
    clean = launcher(module, op)(**arguments)
    arguments["x"][1, 3], arguments["x"][2, 5] = torch.nan, torch.inf
    y = launcher(module, op)(**arguments)
    assert not y[1:3].isfinite().any()
    rest = [row for row in range(rows) if row not in (1, 2)]
    assert torch.equal(y[rest], clean[rest])
