"""The table of activations: every row against PyTorch, C, Triton and ONNX, and a row that is added from outside."""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.softplus import registered_softplus, softplus_row
from tilewright.kernels import activation as table
from tilewright.kernels.activation import TABLE, Activation, activation_gradient, apply_activation, module_activation
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.cpu import build, native, steps
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import implementations

SLOPE = 0.3
PACKAGE = Path(tw.__file__).parent
#: What each row says, in PyTorch's own words.
MODULES: dict[str, nn.Module] = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(SLOPE),
    "sigmoid": nn.Sigmoid(),
}
X = torch.cat([torch.linspace(-9.1, 9.1, 401, dtype=torch.float64), torch.tensor([torch.inf, torch.nan]).double()])


softplus = pytest.fixture(registered_softplus)


def rows() -> dict[str, Activation]:
    return {**TABLE, "softplus": softplus_row()}


MODULES["softplus"] = nn.Softplus()


@pytest.mark.parametrize("name", MODULES)
def test_definition_and_gradient_are_pytorchs(name: str) -> None:
    row, z = rows()[name], X.clone().requires_grad_()
    expected, grad = MODULES[name](z), torch.linspace(1, 2, len(X), dtype=torch.float64)
    torch.testing.assert_close(row.forward(X, False, SLOPE), expected, equal_nan=True)
    torch.testing.assert_close(row.forward(X.clone(), True, SLOPE), expected, equal_nan=True)
    (gradient,) = torch.autograd.grad(expected, z, grad)
    torch.testing.assert_close(row.backward(grad, X, SLOPE), gradient, equal_nan=True)
    assert bool((expected.nan_to_num(0.0) >= 0).all()) or not row.nonnegative


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.forms])
def test_its_module_is_recognised_and_no_subclass_of_it(name: str) -> None:
    module = MODULES[name]
    assert module_activation(module) == (name, SLOPE if name == "leaky_relu" else 0.0)
    assert module_activation(type("Other", (type(module),), {})()) is None


def test_a_bounded_module_is_what_its_bounds_say() -> None:
    assert module_activation(nn.Hardtanh(0, 6)) == ("relu6", 0.0)
    assert module_activation(nn.Hardtanh(0, float("inf"))) == ("relu", 0.0)
    assert module_activation(nn.Hardtanh()) is None
    assert module_activation(nn.Sigmoid()) is None


def test_numbers_are_those_of_c() -> None:
    header = (build.FOLDER / "activation.h").read_text(encoding="utf-8")
    (body,) = re.findall(r"enum \{([^}]*)\}", header)
    in_c = {name.strip().lower(): number for number, name in enumerate(body.split(","))}
    assert in_c == {row.name: row.number for row in TABLE.values()}
    assert native.ACTIVATIONS.keys() | steps.ACTIVATIONS.keys() == TABLE.keys()


def test_triton_has_what_the_table_says() -> None:
    source = (PACKAGE / "kernels" / "triton" / "common.py").read_text(encoding="utf-8")
    (function,) = (each for each in ast.parse(source).body if getattr(each, "name", "") == "activate")
    compared = re.findall(r'ACTIVATION == "(\w+)"', ast.unparse(function).replace("'", '"'))
    assert sorted(compared) == sorted(table.TRITON_ACTIVATIONS)


def test_there_is_no_second_list() -> None:
    names = {"gelu_tanh", "relu6", "hardswish", "leaky_relu", "hardtanh", "swish"}
    own = {"kernels/activation.py", "kernels/triton/common.py"}
    found = {
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if str(path.relative_to(PACKAGE)) not in own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert not found


@pytest.mark.parametrize("name", [name for name, row in rows().items() if row.onnx])
def test_onnx_runtime_computes_the_same(name: str) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    nodes: list[Any] = []
    constants: list[Any] = []

    def write(kind: str, *inputs: Any, **attributes: Any) -> str:
        given = []
        for each in inputs:
            if isinstance(each, float):
                constants.append(onnx.helper.make_tensor(f"c{len(constants)}", onnx.TensorProto.FLOAT, (), [each]))
            given.append(constants[-1].name if isinstance(each, float) else each)
        nodes.append(onnx.helper.make_node(kind, given, [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    row = rows()[name]
    assert row.onnx is not None
    end = row.onnx(write, "x", SLOPE)
    nodes.append(onnx.helper.make_node("Identity", [end], ["y"]))
    ends = [onnx.helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, [None]) for each in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, name, ends[:1], ends[1:], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = X[:-2].float()
    actual = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(actual, row.forward(x, False, SLOPE), rtol=1e-5, atol=1e-5)


# ---- an activation of somebody else's
def test_operators_accept_one_that_is_registered(softplus: str) -> None:
    x, weight, scale = torch.randn(3, 32), torch.randint(-9, 10, (16, 32), dtype=torch.int8), torch.rand(16) / 9
    plain = torch.ops.tilewright.int8_linear(x, weight, scale)
    torch.testing.assert_close(
        torch.ops.tilewright.int8_linear(x, weight, scale, activation=softplus), F.softplus(plain), rtol=1e-5, atol=1e-5
    )
    image, filters = torch.randn(1, 8, 6, 6), torch.randn(16, 3, 3, 8)
    plain = torch.ops.tilewright.conv2d_fused(image, filters)
    fused = torch.ops.tilewright.conv2d_fused(image, filters, activation=softplus)
    torch.testing.assert_close(fused, F.softplus(plain), rtol=1e-5, atol=1e-5)


def test_operators_know_it_no_more_when_it_is_gone() -> None:
    x, weight, scale = torch.randn(3, 32), torch.ones(16, 32, dtype=torch.int8), torch.ones(16)
    with pytest.raises(ValueError, match="activation 'softplus' is unknown; the known ones are none, relu, gelu"):
        torch.ops.tilewright.int8_linear(x, weight, scale, activation="softplus")
    for function in (apply_activation, lambda z, name: activation_gradient(z, z, name)):
        with pytest.raises(ValueError, match="'softplus' is unknown"):
            function(x, "softplus")


def test_only_new_names_are_registered_and_only_those_taken_away(softplus: str) -> None:
    with pytest.raises(ValueError, match="there is an activation 'softplus' already"):
        table.register_activation(softplus_row())
    for name in ("relu", "mish"):
        with pytest.raises(ValueError, match=f"no activation '{name}' was registered"):
            table.unregister_activation(name)


OPERATORS = [
    schema.name.partition("::")[2]
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("tilewright::") and any(each.name == "activation" for each in schema.arguments)
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_our_kernels_decline_one_that_they_do_not_have(device: str, softplus: str) -> None:
    geometry = ConvGeometry(1, 64, 14, 14, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    facts: dict[str, Any] = {"device": device, "group_size": 32, "conv": geometry}
    if device == "cuda":
        facts |= {"capability": (9, 0), "multiprocessors": 132}
    declined = set()
    for op in OPERATORS:
        for m, dtype in itertools.product((4, 512), (torch.float32, torch.float16, torch.int8)):
            problem = Problem(op, m, 64, 576, dtype, out_dtype=torch.float32, **facts)
            for each in implementations(op):
                # The others finish in PyTorch, as the definition does.
                if each.name.split()[0] in ("Triton,", "Triton", "C") and each.why_not(problem) is None:
                    assert softplus in str(each.why_not(replace(problem, activation=softplus))), f"{op}: {each.name}"
                    declined.add((op, each.name))
    assert len(declined) >= (10 if device == "cuda" else 5), declined
