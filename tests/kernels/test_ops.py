"""The ``torch.library`` operators: opcheck, tracing, export, gradients, autocast, answers to bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from tests.kernels.problems import LINEAR_OPS, QUANTIZERS, Case, make, weight64
from tilewright.kernels.activation import ACTIVATIONS, apply_activation
from tilewright.kernels.formats.int8 import Int8
from tilewright.kernels.linear import dequantized_weight

DIFFERENTIABLE = tuple(op for op in LINEAR_OPS if op != "int8_linear_quantized")


def operator(name: str) -> Any:
    return getattr(torch.ops.tilewright, name)


def call(op: str, arguments: dict[str, Any]) -> Any:
    return operator(op)(**arguments)


def arguments_of(op: str, **changes: Any) -> dict[str, Any]:
    if op in LINEAR_OPS:
        return make(Case(op).with_(**{"n": 40, "k": 64, **changes}))
    case = {"m": 3, "k": 64, "dtype": torch.float32, **changes}
    arguments: dict[str, Any] = {"x": torch.randn(case["m"], case["k"]).to(case["dtype"])}
    if op == "quantize_per_row":
        arguments["channel_scale"] = torch.rand(case["k"]) + 0.5
    else:
        arguments["weight"] = torch.randn(case["k"])
    return arguments


# ---- PyTorch's own checks
@pytest.mark.parametrize("op", LINEAR_OPS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": False, "dtype": torch.bfloat16},
        {"residual": True, "activation": "silu", "channel_scale": True, "symmetric": False},
        {"m": 0},
        {"n": 1, "k": 1, "m": 1},
    ],
    ids=["plain", "bare-bfloat16", "everything", "no_rows", "ones"],
)
def test_opcheck_of_linear_operators(op: str, changes: dict[str, Any]) -> None:
    arguments = arguments_of(op, **changes)
    if op in DIFFERENTIABLE:
        for name in ("x", "bias", "residual"):
            if arguments[name] is not None:
                arguments[name].requires_grad_()
    torch.library.opcheck(operator(op).default, (), arguments)


@pytest.mark.parametrize("op", QUANTIZERS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 0, 8), (7,)], ids=str)
def test_opcheck_of_quantisers(op: str, shape: tuple[int, ...]) -> None:
    torch.library.opcheck(operator(op).default, (torch.randn(shape),))
    torch.library.opcheck(operator(op).default, (torch.randn(shape), torch.rand(shape[-1])))


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_fake_tensors_have_the_shape_and_dtype_of_real_ones(op: str) -> None:
    for dtype in (torch.float16, torch.float32):
        arguments = arguments_of(op, dtype=dtype)
        real = call(op, arguments)
        fake = call(op, {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert fake.is_meta


# ---- compile and export
@pytest.mark.parametrize("op", [*LINEAR_OPS, *QUANTIZERS])
def test_compiles_in_one_graph_and_at_most_twice_for_any_batch(op: str) -> None:
    arguments = arguments_of(op, m=24)
    inputs = [name for name in ("x", "x_scale", "residual") if arguments.get(name) is not None]
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def run(**changing: torch.Tensor) -> Any:
        return call(op, arguments | changing)

    torch._dynamo.reset()
    for m in (24, 5, 17, 9):
        part = {name: arguments[name][:m] for name in inputs}
        expected = call(op, arguments | part)
        torch.testing.assert_close(run(**part), expected, rtol=0, atol=0)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_compiled_with_a_strided_input(op: str) -> None:
    """Fused into a graph that Inductor lays out as it likes."""
    arguments = arguments_of(op, m=32, k=64)

    def run(x: torch.Tensor) -> torch.Tensor:
        image = x.view(2, 4, 4, 64).permute(0, 3, 1, 2)  # channels-last memory
        image = image + 1 if x.is_floating_point() else image
        rows = image.permute(0, 2, 3, 1).reshape(-1, 64)
        return call(op, arguments | {"x": rows}).sum(0)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments["x"]), run(arguments["x"]))
    turned = arguments["x"].t().contiguous().t()
    torch.testing.assert_close(compiled(turned), run(turned))


@pytest.mark.parametrize("op", LINEAR_OPS)
def test_exports_and_runs_at_another_batch(op: str) -> None:
    arguments = arguments_of(op, m=6)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, x_scale: torch.Tensor | None) -> torch.Tensor:
            changing = {"x": x} if x_scale is None else {"x": x, "x_scale": x_scale}
            return call(op, arguments | changing)

    x, x_scale = arguments["x"], arguments.get("x_scale")
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(
        Layer(), (x, x_scale), dynamic_shapes=({0: rows}, None if x_scale is None else {0: rows})
    )
    assert any(str(node.target) == f"tilewright.{op}.default" for node in exported.graph.nodes)
    other = arguments_of(op, m=11)
    given = {name: other[name] for name in ("x", "x_scale") if name in other}
    y = exported.module()(other["x"], other.get("x_scale"))
    assert torch.equal(y, call(op, arguments | given))


# ---- gradients
def dequantized_layer(op: str, arguments: dict[str, Any], case: Case) -> Callable[..., torch.Tensor]:
    """The float layer whose gradient is taken: no rounding of activations."""
    weight = torch.from_numpy(weight64(case, arguments))
    channel_scale = arguments.get("channel_scale")
    if channel_scale is not None:
        weight = weight * channel_scale.double()

    def layer(x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
        y = apply_activation(F.linear(x, weight, bias), case.activation)
        return y if residual is None else y + residual

    return layer


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_are_those_of_the_dequantised_layer(op: str, activation: str) -> None:
    case = Case(op, m=6, n=40, k=64, activation=activation, residual=True, channel_scale=True, symmetric=False)
    arguments = make(case)
    names = ("x", "bias", "residual")
    ours = {name: arguments[name].clone().requires_grad_() for name in names}
    theirs = {name: arguments[name].double().requires_grad_() for name in names}
    grad = torch.randn(6, 40)
    call(op, arguments | ours).backward(grad)
    dequantized_layer(op, arguments, case)(**theirs).backward(grad.double())
    for name in names:
        assert ours[name].grad is not None
        assert ours[name].grad.dtype == ours[name].dtype
        torch.testing.assert_close(ours[name].grad.double(), theirs[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_have_the_dtype_of_their_inputs(op: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(op, dtype=dtype, activation="gelu", residual=True)
    for name in ("x", "bias", "residual"):
        arguments[name].requires_grad_()
    call(op, arguments).float().square().sum().backward()
    for name in ("x", "bias", "residual"):
        assert arguments[name].grad.dtype == dtype
        assert torch.isfinite(arguments[name].grad).all()


@pytest.mark.parametrize("required", ["x", "bias", "residual"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_only_the_gradient_asked_for(op: str, required: str) -> None:
    arguments = arguments_of(op, residual=True, activation="relu")
    arguments[required].requires_grad_()
    call(op, arguments).sum().backward()
    assert arguments[required].grad.shape == arguments[required].shape


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0), (1, 1, 1)], ids=str)
def test_gradients_of_empty_and_single_problems(op: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    arguments = arguments_of(op, m=m, n=n, k=k)
    arguments["x"].requires_grad_()
    arguments["bias"].requires_grad_()
    call(op, arguments).sum().backward()
    assert arguments["x"].grad.shape == (m, k)
    assert torch.equal(arguments["bias"].grad, torch.full((n,), float(m)))


def test_the_gradient_of_a_1d_input() -> None:
    arguments = arguments_of("int8_linear")
    x, bias = arguments["x"][0].clone().requires_grad_(), arguments["bias"].requires_grad_()
    call("int8_linear", arguments | {"x": x}).sum().backward()
    torch.testing.assert_close(x.grad, dequantized_weight(Int8, arguments).sum(0))
    assert torch.equal(bias.grad, torch.ones(40))


def test_the_gradient_of_a_scale_is_that_of_the_largest_magnitude() -> None:
    x = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.25, -0.125]], requires_grad=True)
    q, scale = torch.ops.tilewright.quantize_per_row(x)
    assert not q.requires_grad, "integers have no derivative"
    scale.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, -1 / 127, 0.0], [1 / 127, 0.0, 0.0]]))


def test_the_gradient_of_a_scale_of_rows() -> None:
    arguments = arguments_of("int8_linear_quantized")
    scale = arguments["x_scale"].requires_grad_()
    y = call("int8_linear_quantized", arguments | {"activation": "relu", "out_dtype": torch.float32})
    y.sum().backward()
    rows = arguments["x"].double() @ dequantized_weight(Int8, arguments, torch.float64).T
    slope = ((rows * scale[:, None] + arguments["bias"]) > 0).double()
    torch.testing.assert_close(scale.grad.double(), (rows * slope).sum(-1), rtol=1e-4, atol=1e-4)


# ---- autocast
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast_casts_activations_and_nothing_else(op: str) -> None:
    arguments = arguments_of(op, residual=True, channel_scale=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(op, arguments)
        wide = call(op, arguments | {"x": arguments["x"].double()})
    assert y.dtype == torch.bfloat16
    assert wide.dtype == torch.float64, "as PyTorch's operators, float64 is left alone"
    cast = {name: arguments[name].bfloat16() for name in ("x", "residual")}
    assert torch.equal(y, call(op, arguments | cast))
    with torch.autocast("cpu", torch.bfloat16):
        x = arguments["x"].clone().requires_grad_()
        call(op, arguments | {"x": x}).sum().backward()
    assert x.grad.dtype == torch.float32


# ---- bad arguments
INT8 = ("int8_linear", "int8_linear_quantized", "int8_weight_only_linear")
INT4 = ("int4_linear", "int4_int8_linear")
long = torch.ones(40, dtype=torch.long)
BAD_ARGUMENTS = [
    (
        (*DIFFERENTIABLE, *QUANTIZERS),
        {"x": torch.ones(3, 64, dtype=torch.int32)},
        TypeError,
        "x must be a float tensor",
    ),
    (DIFFERENTIABLE, {"x": torch.ones(3, 64).to(torch.float8_e4m3fn)}, TypeError, "x must be a float tensor"),
    (("int8_linear_quantized",), {"x": torch.ones(3, 64)}, TypeError, "x must be torch.int8, not torch.float32"),
    ((*DIFFERENTIABLE, *QUANTIZERS), {"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
    (LINEAR_OPS, {"bias": torch.ones(39)}, ValueError, r"bias must have shape \[40\], not \[39\]"),
    (LINEAR_OPS, {"bias": torch.ones(40, 1)}, ValueError, r"bias must have shape \[40\], not \[40, 1\]"),
    (LINEAR_OPS, {"bias": long}, TypeError, "bias must be a float tensor, not torch.int64"),
    (LINEAR_OPS, {"bias": torch.ones(40, device="meta")}, ValueError, "x is on cpu, but bias is on meta"),
    (LINEAR_OPS, {"residual": torch.ones(40)}, ValueError, r"residual must have shape \[3, 40\], not \[40\]"),
    (LINEAR_OPS, {"residual": torch.tensor(1.0)}, ValueError, r"residual must have shape \[3, 40\], not \[\]"),
    (LINEAR_OPS, {"residual": torch.ones(3, 40).long()}, TypeError, "residual must be a float tensor"),
    (LINEAR_OPS, {"activation": "tanh"}, ValueError, "activation 'tanh' is unknown.*none, relu, gelu, gelu_tanh, silu"),
    (INT8, {"weight": torch.ones(40, 64)}, TypeError, "weight must be int8, not torch.float32"),
    (INT8, {"weight": torch.ones(64, dtype=torch.int8)}, ValueError, r"weight must be a matrix \[N, K\]"),
    (INT8, {"weight": torch.ones(40, 63, dtype=torch.int8)}, ValueError, "last dimension of x is 64, .* takes 63"),
    (INT8, {"weight_scale": torch.ones(1)}, ValueError, r"weight_scale must have shape \[40\], not \[1\]"),
    (INT8, {"weight_scale": torch.ones(40).half()}, TypeError, "weight_scale must be float32, not torch.float16"),
    (INT8, {"weight_scale": torch.ones(40, device="meta")}, ValueError, "weight_scale is on meta"),
    (("int8_linear_quantized",), {"x_scale": torch.ones(2)}, ValueError, r"x_scale must have shape \[3\], not \[2\]"),
    (("int8_linear_quantized",), {"x_scale": torch.ones(3).half()}, TypeError, "x_scale must be float32"),
    (INT4, {"weight_packed": torch.ones(40, 8)}, TypeError, "weight_packed must be int32, not torch.float32"),
    (INT4, {"weight_packed": torch.ones(40, 7).int()}, ValueError, "needs 8 words a row, but weight_packed has 7"),
    (INT4, {"weight_packed": torch.ones(8).int()}, ValueError, "weight_packed must be a matrix"),
    (INT4, {"weight_scale": torch.ones(40, 3)}, ValueError, r"shape \[40, 2\] for group_size 32, not \[40, 3\]"),
    (INT4, {"weight_scale": torch.ones(40, 2).int()}, TypeError, "weight_scale must be float16, bfloat16 or float32"),
    (INT4, {"weight_zero": torch.ones(5, 2)}, TypeError, "weight_zero must be int32, not torch.float32"),
    (INT4, {"weight_zero": torch.ones(40, 2).int()}, ValueError, r"weight_zero must have shape \[5, 2\]"),
    (INT4, {"group_size": 0}, ValueError, "group_size must be positive, not 0"),
    (("int8_linear", "int4_int8_linear"), {"channel_scale": torch.ones(3)}, ValueError, r"channel_scale .*\[64\]"),
    (("quantize_per_row",), {"channel_scale": torch.ones(63)}, ValueError, r"channel_scale must have shape \[64\]"),
    (("rms_norm_quantize",), {"weight": torch.ones(63)}, ValueError, r"weight must have shape \[64\], not \[63\]"),
]


@pytest.mark.parametrize(
    "op, changes, error, words",
    [
        pytest.param(op, *rest, id=f"{op}-{i}-{next(iter(rest[0]))}")
        for i, (ops, *rest) in enumerate(BAD_ARGUMENTS)
        for op in ops
    ],
)
def test_bad_arguments_are_named(op: str, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    """By real and by fake tensors, so that a mistake shows when a model is traced."""
    arguments = arguments_of(op) | changes
    with pytest.raises(error, match=words) as raised:
        call(op, arguments)
    assert str(raised.value).startswith(f"{op}: ") or "activation" in changes
    if not any(isinstance(value, torch.Tensor) and value.is_meta for value in changes.values()):
        fake = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        with pytest.raises(error, match=words):
            call(op, fake)
