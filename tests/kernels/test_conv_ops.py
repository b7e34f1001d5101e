"""The operators of convolution: opcheck, tracing, export, gradients, autocast, bad arguments, CUDA traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.conv_problems import INTEGERS, ConvShape, make_conv_arguments, reference_result
from tilewright.kernels.activation import CONV_ACTIVATIONS, apply_activation
from tilewright.kernels.conv_geometry import oihw
from tilewright.kernels.dispatch import router

ODD = ConvShape(2, 6, (7, 5), 9, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 3, torch.float32, residual=True)
OPS = {"conv2d_fused": torch.float32, "int8_conv2d_fused": torch.int8}
EACH_OP = pytest.mark.parametrize("op", OPS)


def operator(name: str) -> Any:
    return getattr(torch.ops.tilewright, name)


def arguments_of(op: str, **changes: Any) -> dict[str, Any]:
    return make_conv_arguments(ConvShape(**{**vars(ODD), "dtype": OPS[op], **changes}))


# ---- PyTorch's own checks
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32, "activation": "silu"},
        {"dtype": torch.bfloat16, "bias": False, "residual": False},
        {"dtype": torch.float16, "activation": "leaky_relu"},
        {"dtype": torch.float32, "batch": 0},
        {
            "dtype": torch.float32,
            "channels": 1,
            "out_channels": 1,
            "groups": 1,
            "size": 1,
            "window": 1,
            "padding": None,
        },
        {"dtype": torch.int8, "activation": "relu"},
        {"dtype": torch.uint8, "residual": False},
        {"dtype": torch.int8, "out_dtype": torch.float16},
        {"dtype": torch.int8, "batch": 0},
    ],
    ids=lambda changes: "-".join(str(value).removeprefix("torch.") for value in changes.values()),
)
def test_opcheck(changes: dict[str, Any]) -> None:
    shape = ConvShape(**{**vars(ODD), **changes})
    arguments = make_conv_arguments(shape)
    if shape.op == "conv2d_fused":
        for name in ("x", "weight", "bias", "residual"):
            if arguments[name] is not None:
                arguments[name].requires_grad_()
    torch.library.opcheck(operator(shape.op).default, (), arguments)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (7, 3), (0, 3, 5, 4), (2, 1, 3, 3)], ids=str)
def test_opcheck_of_quantisation(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(operator("quantize_per_tensor").default, (torch.randn(shape), 0.1))
    torch.library.opcheck(operator("quantize_per_tensor").default, (torch.randn(shape), 0.1, torch.uint8))
    for sample_dims in (0, 1):
        arguments = (torch.randn(shape), 0.1, sample_dims)
        torch.library.opcheck(operator("quantize_per_tensor_marked").default, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("out_channels", [9, 3])
def test_the_operator_is_its_reference(dtype: torch.dtype, out_channels: int) -> None:
    """Whatever serves it here, for images in any memory order; tensors that are not dense, too."""
    arguments = make_conv_arguments(ConvShape(**{**vars(ODD), "dtype": dtype, "out_channels": out_channels}))
    op = "int8_conv2d_fused" if dtype in INTEGERS else "conv2d_fused"
    expected = reference_result(op, arguments)
    wide = torch.zeros(2, 12, 7, 10, dtype=dtype)
    wide[:, ::2, :, ::2] = arguments["x"]
    for x in (arguments["x"], arguments["x"].contiguous(), wide[:, ::2, :, ::2]):
        y = operator(op)(**arguments | {"x": x})
        assert (y.dtype, y.shape, y.stride()) == (expected.dtype, expected.shape, expected.stride())
        if dtype in INTEGERS:
            assert (y.int() - expected.int()).abs().max() <= 1
            assert (y != expected).double().mean() < 0.01
        else:
            torch.testing.assert_close(y, expected)


# ---- compile and export
@EACH_OP
def test_compiles_in_one_graph_and_at_most_twice_for_any_batch(op: str) -> None:
    arguments = arguments_of(op, batch=6)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def run(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return operator(op)(**arguments | {"x": x, "residual": residual})

    torch._dynamo.reset()
    for n in (6, 2, 5, 3):
        part = {name: arguments[name][:n] for name in ("x", "residual")}
        assert torch.equal(run(**part), operator(op)(**arguments | part))
    assert 1 <= counter.frame_count <= 2


@EACH_OP
def test_exports_and_runs_at_another_size(op: str) -> None:
    arguments = arguments_of(op, residual=False)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return operator(op)(**arguments | {"x": x})

    sizes = {0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("height", min=4, max=64)}
    exported = torch.export.export(Layer(), (arguments["x"],), dynamic_shapes=(sizes,))
    assert any(str(node.target) == f"tilewright.{op}.default" for node in exported.graph.nodes)
    x = arguments_of(op, batch=3, size=(11, 5))["x"]
    assert torch.equal(exported.module()(x), operator(op)(**arguments | {"x": x}))


def test_a_chain_compiles_with_inductors_strides() -> None:
    """Quantise, convolve twice, pool: one graph in which Inductor may lay out every tensor as it likes."""
    first = arguments_of("int8_conv2d_fused", residual=False)
    second = make_conv_arguments(ConvShape(2, 9, (3, 6), 4, dtype=torch.int8, out_dtype=torch.float32))

    def run(x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.tilewright.quantize_per_tensor(x * 2, 0.02)
        y = torch.ops.tilewright.int8_conv2d_fused(**first | {"x": q})
        return torch.ops.tilewright.int8_conv2d_fused(**second | {"x": y}).mean((2, 3))

    x = torch.randn(2, 6, 7, 5)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


# ---- gradients
@pytest.mark.parametrize("activation", CONV_ACTIVATIONS)
def test_gradients_are_those_of_pytorch(activation: str) -> None:
    arguments = arguments_of("conv2d_fused", activation=activation)
    names = ("x", "weight", "bias", "residual")
    ours = {name: arguments[name].clone().requires_grad_() for name in names}
    theirs = {name: arguments[name].double().requires_grad_() for name in names}
    y = operator("conv2d_fused")(**arguments | ours)
    grad = torch.randn_like(y)
    y.backward(grad)
    image = F.pad(theirs["x"], (2, 1, 1, 0))
    z = F.conv2d(image, oihw(theirs["weight"]), theirs["bias"], (2, 1), 0, (1, 2), 3) + theirs["residual"]
    apply_activation(z, activation, negative_slope=0.2).backward(grad.double())
    for name in names:
        assert ours[name].grad.dtype == torch.float32
        torch.testing.assert_close(ours[name].grad.double(), theirs[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("required", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("changes", [{}, {"batch": 0}, {"dtype": torch.bfloat16}], ids=["plain", "empty", "bfloat16"])
def test_only_the_gradient_asked_for(required: str, changes: dict[str, Any]) -> None:
    arguments = arguments_of("conv2d_fused", activation="relu6", **changes)
    value = arguments[required].requires_grad_()
    operator("conv2d_fused")(**arguments).float().sum().backward()
    assert (value.grad.shape, value.grad.dtype) == (value.shape, value.dtype)
    assert bool(value.grad.any()) == ("batch" not in changes)


def test_the_gradient_of_the_bias_of_a_quantised_convolution() -> None:
    arguments = arguments_of("int8_conv2d_fused", out_dtype=torch.float32, activation="relu")
    bias = arguments["bias"].requires_grad_()
    y = operator("int8_conv2d_fused")(**arguments)
    y.sum().backward()
    assert torch.equal(bias.grad, (y > 0).float().sum((0, 2, 3)))


def test_integers_have_no_gradient() -> None:
    arguments = arguments_of("int8_conv2d_fused", out_dtype=torch.int8)
    arguments["bias"].requires_grad_()
    assert not operator("int8_conv2d_fused")(**arguments).requires_grad


# ---- autocast
def test_autocast_casts_what_pytorch_casts() -> None:
    arguments = arguments_of("conv2d_fused")
    with torch.autocast("cpu", torch.bfloat16):
        y = operator("conv2d_fused")(**arguments)
        q = torch.ops.tilewright.quantize_per_tensor(arguments["x"], 0.01)
    assert y.dtype == torch.bfloat16
    cast = {name: arguments[name].bfloat16() for name in ("x", "weight", "residual")}
    assert torch.equal(y, operator("conv2d_fused")(**arguments | cast))
    assert torch.equal(q, torch.ops.tilewright.quantize_per_tensor(arguments["x"], 0.01)), "not rounded before"


# ---- what is remembered
def twice(**arguments: Any) -> torch.Tensor:
    return 2 * reference_result("conv2d_fused", arguments)


def test_a_new_implementation_serves_calls_that_another_has_served() -> None:
    arguments = arguments_of("conv2d_fused")
    before = operator("conv2d_fused")(**arguments)
    first = router.implementations("conv2d_fused")[0].name
    router.register(
        router.Implementation("twice", "conv2d_fused", lambda problem: None, f"{__name__}:twice"), before=first
    )
    try:
        assert torch.equal(operator("conv2d_fused")(**arguments), twice(**arguments))
    finally:
        router.unregister("conv2d_fused", "twice")
    assert torch.equal(operator("conv2d_fused")(**arguments), before)


# ---- bad arguments
def image(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(size, dtype=dtype)


FLOAT, INT8 = ("conv2d_fused",), ("int8_conv2d_fused",)
BAD_ARGUMENTS = [
    (FLOAT, {"x": image(2, 6, 7, 5).int()}, TypeError, "x must be a float tensor"),
    (FLOAT, {"weight": image(9, 3, 2, 2).half()}, TypeError, "weight must have the dtype of x, torch.float32, not"),
    (FLOAT, {"bias": torch.ones(9).half()}, TypeError, "bias must be float32 or have the dtype of x"),
    (FLOAT, {"residual": image(2, 9, 3, 6).to(torch.int8)}, TypeError, "residual must be a float tensor"),
    (INT8, {"x": image(2, 6, 7, 5)}, TypeError, "x must be int8 or uint8, not torch.float32"),
    (INT8, {"weight": image(9, 3, 2, 2)}, TypeError, "weight must be int8, not torch.float32"),
    (INT8, {"weight_scale": torch.ones(8)}, ValueError, r"weight_scale must have shape \[9\], not \[8\]"),
    (INT8, {"weight_scale": torch.ones(9).double()}, TypeError, "weight_scale must be float32, not torch.float64"),
    (INT8, {"residual": image(2, 9, 3, 6).long()}, TypeError, "residual must be int8, uint8, float16"),
    (INT8, {"x_scale": 0.0}, ValueError, "x_scale must be positive and finite, not 0.0"),
    (INT8, {"out_scale": float("nan")}, ValueError, "out_scale must be positive and finite, not nan"),
    (INT8, {"residual_scale": float("inf")}, ValueError, "residual_scale must be positive and finite, not inf"),
    (INT8, {"out_dtype": torch.float16}, TypeError, "out_dtype must be one of int8, uint8 with out_scale"),
    (INT8, {"out_scale": None}, TypeError, "out_dtype must be one of float16, bfloat16, float32 without out_scale"),
    (OPS, {"x": image(6, 7, 5)}, (TypeError, ValueError), "x must have four|x must be int8"),
    (
        OPS,
        {"groups": 2},
        ValueError,
        "x has 6 channels, but weight of shape .* takes 2 in each of 2 groups, so 4",
    ),
    (OPS, {"groups": 0}, ValueError, "groups must be an integer of at least 1, not 0"),
    (OPS, {"stride": [0, 1]}, ValueError, r"stride must be 2 integers of at least 1, not \[0, 1\]"),
    (OPS, {"padding": [0, 0, -1, 0]}, ValueError, "padding must be 4 integers of at least 0"),
    (OPS, {"dilation": [9, 1]}, ValueError, r"window of 3 x 2 with dilation \[9, 1\] does not fit .* image of 7 x 5"),
    (OPS, {"bias": torch.ones(8)}, ValueError, r"bias must have shape \[9\], not \[8\]"),
    (OPS, {"bias": torch.ones(9, device="meta")}, ValueError, "x is on cpu, but bias is on meta"),
    (OPS, {"residual": image(2, 9, 6, 3)}, ValueError, r"residual must have the shape of the result, \[2, 9, 3, 6\]"),
    (OPS, {"activation": "swish"}, ValueError, "activation 'swish' is unknown.*leaky_relu"),
]


@pytest.mark.parametrize(
    "op, changes, error, words",
    [
        pytest.param(op, *rest, id=f"{op}-{i}-{next(iter(rest[0]))}")
        for i, (ops, *rest) in enumerate(BAD_ARGUMENTS)
        for op in ops
    ],
)
def test_bad_arguments_are_named(op: str, changes: dict[str, Any], error: Any, words: str) -> None:
    """By real and by fake tensors, so that a mistake shows when a model is traced."""
    arguments = arguments_of(op) | changes
    with pytest.raises(error, match=words) as raised:
        operator(op)(**arguments)
    assert str(raised.value).startswith(f"{op}: ") or "activation" in changes
    if not any(isinstance(value, torch.Tensor) and value.is_meta for value in changes.values()):
        fake = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
        with pytest.raises(error, match=words):
            operator(op)(**fake)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_scale_is_named(scale: float) -> None:
    for dims, most in ((4, 1), (3, 2), (0, 0)):
        for given in (-1, most + 1):
            with pytest.raises(
                ValueError, match=f"sample_dims must be 0 to {most} for x of {dims} dimensions, not {given}"
            ):
                torch.ops.tilewright.quantize_per_tensor_marked(torch.ones((2,) * dims), 1.0, given)
    with pytest.raises(ValueError, match="quantize_per_tensor: scale must be positive and finite"):
        torch.ops.tilewright.quantize_per_tensor(torch.ones(3), scale)
    with pytest.raises(TypeError, match="out_dtype must be int8 or uint8, not torch.int16"):
        torch.ops.tilewright.quantize_per_tensor(torch.ones(3), 1.0, torch.int16)


# ---- rung 6: CUDA traced without a GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8], ids=str)
def test_on_cuda_results_have_the_shape_and_strides_of_the_definition(dtype: torch.dtype) -> None:
    shape = ConvShape(**{**vars(ODD), "dtype": dtype})
    arguments = make_conv_arguments(shape)
    expected = reference_result(shape.op, arguments)
    with FakeTensorMode():
        fake = {
            name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")
            if isinstance(v, torch.Tensor)
            else v
            for name, v in arguments.items()
        }
        y = operator(shape.op)(**fake)
        q = torch.ops.tilewright.quantize_per_tensor(y.float(), 0.1)
    assert (y.device.type, q.device.type) == ("cuda", "cuda")
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert (q.shape, q.stride(), q.dtype) == (expected.shape, expected.stride(), torch.int8)
