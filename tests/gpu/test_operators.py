"""Every operator on a GPU, through every implementation and every config, against its definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.problems import LINEAR, OPS, QUANTIZERS, Shape, make_arguments
from tests.gpu.compare import check, check_dense_weight
from tilewright.kernels.dispatch.problem import Problem, device_facts
from tilewright.kernels.dispatch.router import Implementation, implementations

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS: tuple[dict[str, Any], ...] = (
    {"group_size": 128},
    {"group_size": 32, "symmetric": False},
    {"group_size": 64, "symmetric": False, "activation": "gelu"},
    {"group_size": None, "activation": "silu", "residual": True},
)
#: For a kernel that takes units of 64 columns.
FRAGMENT_GROUPS = tuple(
    {**options, "group_size": size} for options, size in zip(GROUPS, (128, 128, 64, None), strict=True)
)
ENDS: tuple[dict[str, Any], ...] = (
    {"bias": False},
    {"activation": "relu", "residual": True},
    {"activation": "gelu"},
    {"activation": "gelu_tanh", "bias": False, "residual": True},
    {"activation": "silu"},
)


def shapes(op: str) -> list[Shape]:
    """Aligned, ragged and tiny problems, each with two epilogues or groups, and all dtypes in turn.

    Each may compile another kernel: every combination would take an hour.
    """
    if op in QUANTIZERS:
        sizes = ((1, 1), (5, 64), (33, 1001), (7, 4096), (3, 16385))
        return [Shape(m, 0, k, dtype) for m, k in sizes for dtype in DTYPES]
    sizes = ((1, 256, 512), (16, 520, 1024), (77, 130, 300), (129, 257, 640), (300, 512, 256), (1, 1, 1))
    options = GROUPS if op.startswith("int4") else ENDS
    found = [
        Shape(m, n, k, DTYPES[(i + j) % 3], **options[j])
        for i, (m, n, k) in enumerate(sizes)
        for j in (i % len(options), (i + 1) % len(options))
    ]
    if op in ("int4_linear", "int8_weight_only_linear"):
        found.append(Shape(40, 200, 512, torch.float32, compute_dtype=torch.bfloat16, **options[1]))
    return found


def name_of(shape: Shape) -> str:
    group = f"-g{shape.group_size}" if shape.group_size else ""
    return f"{shape.m}x{shape.n}x{shape.k}-{str(shape.dtype)[6:]}{group}-{shape.activation}"


CASES = [pytest.param(op, shape, id=f"{op}-{name_of(shape)}") for op in OPS for shape in shapes(op)]


def problem_of(op: str, shape: Shape) -> Problem:
    return Problem(
        op,
        m=shape.m,
        n=shape.n or shape.k,
        k=shape.k,
        x_dtype=torch.int8 if op == "int8_linear_quantized" else shape.dtype,
        group_size=(shape.group_size or shape.k) if "int4" in op else None,
        symmetric=shape.symmetric,
        scale_dtype=shape.dtype,
        compute_dtype=shape.compute_dtype,
        activation=shape.activation,
        bias=shape.bias,
        residual=shape.residual,
        **device_facts(torch.device("cuda", torch.cuda.current_device())),
    )


def on_gpu(arguments: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def call(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.tilewright, op)(**arguments)


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op, shape", CASES)
def test_every_implementation(op: str, shape: Shape) -> None:
    problem, arguments = problem_of(op, shape), make_arguments(op, shape)
    serving = [one for one in implementations(op) if one.why_not(problem) is None]
    ours = [one for one in serving if one.name != "reference"]
    assert ours, f"only the reference takes {problem}"
    for implementation in serving:
        check_implementation(implementation, arguments)


def check_implementation(implementation: Implementation, arguments: dict[str, Any]) -> None:
    try:
        check(implementation.op, implementation.function(**on_gpu(arguments)), arguments)
    except AssertionError as error:
        raise AssertionError(f"implementation {implementation.name!r}: {error}") from error


def config_cases() -> list[Any]:
    """Every config of every family; an AMD config also runs on NVIDIA, and is right or wrong there too."""
    pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
    from bench.catalogue import FAMILIES, describe

    return [
        pytest.param(family, config, id=f"{family.name}-{describe(config)}".replace(" ", "_"))
        for family in FAMILIES
        for config in family.configs
    ]


@pytest.mark.parametrize("family, config", config_cases())
def test_every_config(family: Any, config: Any) -> None:
    if family.op in QUANTIZERS:
        k = config.block_k - 11 if config.one_block else config.block_k + 333
        required = [Shape(config.rows + 1, 0, k, dtype) for dtype in DTYPES]
    else:
        is_sparse, has_units = family.name.startswith("sparse24"), family.name == "int4_linear mma.sync"
        options = FRAGMENT_GROUPS if has_units else GROUPS if family.op.startswith("int4") else ENDS
        m, n = getattr(config, "block_m", 8) + 3, getattr(config, "block_n", 64) + 9
        depths = (384, 512, 256) if is_sparse or has_units else (299, 512, 300)
        required = [Shape(m, n, k, dtype, **end) for k, dtype, end in zip(depths, DTYPES, options[1:], strict=False)]
        if has_units:  # float32 is not for the tensor cores
            required = [replace(shape, m=m - 4) for shape in required if shape.dtype != torch.float32]
        if is_sparse:
            required = [shape for shape in required if family.why_not(problem_of(family.op, shape)) is None]
    for shape in required:
        arguments = make_arguments(family.op, shape)
        launches, outputs = family.plan(on_gpu(arguments), config, inline_ptx=torch.version.hip is None)
        for launch in launches:
            launch.run()
        if family.name == "int4_linear dequantize":
            check_dense_weight(outputs[0], arguments)
        else:
            check(family.op, outputs if family.op in QUANTIZERS else outputs[0], arguments)


@pytest.mark.parametrize("op", OPS)
def test_strides(op: str) -> None:
    """Transposed, sliced, broadcast and offset inputs give what their contiguous copies give."""
    shape = Shape(24, 48, 96, torch.bfloat16, group_size=32, residual=True)
    arguments = on_gpu(make_arguments(op, shape))
    x = arguments["x"]
    wide = torch.zeros(2 * len(x), 2 * x.shape[1] + 1, dtype=x.dtype, device="cuda")
    wide[::2, 1::2] = x
    views = {
        "transposed": x.t().contiguous().t(),
        "strided": wide[::2, 1::2],
        "broadcast": x[:1].expand_as(x),
        "offset": torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x),
        "3-D": x.reshape(2, 12, 96).transpose(0, 1),
    }
    for name, view in views.items():
        others = dict(arguments)
        if view.dim() == 3:
            for rows in ("residual", "x_scale"):
                if arguments.get(rows) is not None:
                    others[rows] = arguments[rows].reshape(2, 12, *arguments[rows].shape[1:]).transpose(0, 1)
        found = tensors(call(op, {**others, "x": view}))
        copies = {key: v.contiguous() if isinstance(v, torch.Tensor) else v for key, v in others.items()}
        copies["x"] = view.contiguous()
        if op in ("rms_norm_quantize", "layer_norm_quantize"):  # the order of their sums may follow the strides
            check(op, found, on_gpu(copies, "cpu"))
        else:
            expected = tensors(call(op, copies))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("op", [op for op in OPS if op != "int8_linear_quantized"])
@pytest.mark.parametrize("m", [4, 40, 300])
def test_a_bad_value_poisons_its_row_and_no_other(op: str, m: int, bad: float) -> None:
    arguments = on_gpu(make_arguments(op, Shape(m, 64, 256, torch.bfloat16, group_size=32)))
    clean = tensors(call(op, arguments))
    x = arguments["x"].clone()
    x[2, 17] = bad
    dirty = tensors(call(op, {**arguments, "x": x}))
    others = torch.arange(m, device="cuda") != 2
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[others], after[others])
    # The integers of a poisoned row say nothing; its scale, or its result, is not finite.
    assert not torch.isfinite(dirty[-1][2]).any()


@pytest.mark.parametrize("op", OPS)
def test_empty_and_one_element(op: str) -> None:
    for m, n, k in ((0, 8, 16), (3, 8, 0), (1, 1, 1)) + (((3, 0, 16),) if op in LINEAR else ()):
        arguments = make_arguments(op, Shape(m, n, k, torch.float16))
        found = tensors(call(op, on_gpu(arguments)))
        expected = tensors(call(op, arguments))
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [1, 16, 100, 513])
def test_a_second_run_repeats_every_bit(op: str, m: int) -> None:
    arguments = on_gpu(make_arguments(op, Shape(m, 1000, 2048, torch.bfloat16, group_size=128)))
    first = tensors(call(op, arguments))
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, tensors(call(op, arguments)), strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [1, 300])
def test_a_cuda_graph_replays_the_operator(op: str, m: int) -> None:
    arguments = on_gpu(make_arguments(op, Shape(m, 256, 512, torch.float16, group_size=128)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(op, arguments)  # compiles and repacks, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(call(op, arguments))
    fresh = make_arguments(op, Shape(m, 256, 512, torch.float16, group_size=128), seed=1)
    arguments["x"].copy_(fresh["x"])
    graph.replay()
    torch.cuda.synchronize()
    expected = tensors(call(op, arguments))
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("op", OPS)
def test_tensors_on_another_device_than_the_current_one(op: str) -> None:
    shape = Shape(17, 130, 300, torch.bfloat16)
    arguments = make_arguments(op, shape)
    with torch.cuda.device(0):
        found = call(op, on_gpu(arguments, "cuda:1"))
    assert all(tensor.device.index == 1 for tensor in tensors(found))
    check(op, found, arguments)


@pytest.mark.parametrize("op", ["quantize_per_row", "rms_norm_quantize", "layer_norm_quantize"])
def test_offsets_past_2_to_the_31(op: str) -> None:
    rows, k = 2**31 // 8192 + 3, 8192
    if torch.cuda.mem_get_info()[0] < 4 * rows * k:
        pytest.skip(f"needs {4 * rows * k >> 30} GiB of free GPU memory")
    arguments = make_arguments(op, Shape(2, 0, k, torch.float16))
    few = on_gpu(arguments)
    x = torch.zeros(rows, k, dtype=torch.float16, device="cuda")
    x[-2:] = few["x"]
    q, scale = call(op, {**few, "x": x})
    check(op, (q[-2:], scale[-2:]), arguments)


@pytest.mark.parametrize("m", [2, 129])
@pytest.mark.parametrize("op", ["int8_linear", "int8_weight_only_linear", "int4_linear", "int4_int8_linear"])
def test_offsets_into_a_weight_past_2_to_the_31(op: str, m: int) -> None:
    n, k = 2**31 // 16384 + 130, 16384
    needed = 6 * n * k
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    shape = Shape(m, 128, k, torch.bfloat16, group_size=128, bias=False)
    arguments = make_arguments(op, shape)
    last = on_gpu(arguments)
    whole = dict(last)
    for name in ("weight", "weight_packed", "weight_scale"):
        if name in last:
            tensor = torch.zeros(n, *last[name].shape[1:], dtype=last[name].dtype, device="cuda")
            tensor[-128:] = last[name]
            whole[name] = tensor
    check(op, call(op, whole)[:, -128:], arguments)
