"""Steps of programs that work on rows: each against float64 or the layers, on every instruction set."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.kernels.replays import replayed
from tilewright.kernels.attention import call
from tilewright.kernels.cpu import native, norms, steps
from tilewright.kernels.cpu.replay import Replays
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.router import Implementation, register, unregister

REASON = steps.why_no_kernels() or (
    None if norms.lanes() else "this PyTorch's layer norm adds in an order that the C kernel does not know"
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def isa(isa: str) -> str:
    """Every instruction set that the processor has vectors for."""
    if not steps.lanes():
        pytest.skip(f"needs vectors, which {isa} has not")
    return isa


def test_a_description_is_the_structure_of_the_c_kernels() -> None:
    size = getattr(native._load()[0], f"tw_step_size_{native.isa()}")
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(steps.Description)


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (2, 64), (5, 127), (70, 384), (9, 1030)])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm(isa: str, rows: int, columns: int, affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(columns, elementwise_affine=affine, eps=1e-6)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, residual = torch.randn(rows, columns) + 3, torch.randn(rows, columns)
    y, replay = replayed(lambda a, b: norm(a + b), x, residual)
    assert replay.native_steps == 2 and len(replay.parts[0].steps) == 1
    with torch.no_grad():
        assert torch.equal(y, norm(x + residual)) and torch.equal(replayed(norm, x)[0], norm(x))
    exact = norm.double()(x.double() + residual.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 if columns > 1 else 1e-2)


@pytest.mark.parametrize("columns", [1, 5, 8, 9, 16, 100, 127, 128, 129, 256, 390, 520, 1024, 2049, 4100, 8192, 33000])
def test_layer_norm_adds_as_pytorch_does(isa: str, columns: int) -> None:
    torch.manual_seed(columns)
    x = 10 * torch.rand(40, 1) * torch.randn(40, columns) + 3 * torch.randn(40, 1)
    x[7], x[8, columns // 2], x[9, -1] = 0.0, torch.inf, torch.nan
    weight, bias = torch.randn(columns), torch.randn(columns)
    assert norms.lanes() in norms.LANES
    for w, b in ((weight, bias), (None, None), (weight, None)):
        y = norms.normalized(x, 1e-12, norms.lanes(), w, b)
        expected = F.layer_norm(x, (columns,), w, b, 1e-12)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert torch.equal(y.signbit() & ~y.isnan(), expected.signbit() & ~y.isnan())


@pytest.mark.parametrize("count", norms.LANES)
def test_layer_norm_in_either_number_of_lanes_is_right(isa: str, count: int) -> None:
    torch.manual_seed(0)
    for columns in (3, 40, 300, 4100):
        x = torch.randn(6, columns) + 3
        exact = F.layer_norm(x.double(), (columns,), None, None, 1e-6)
        torch.testing.assert_close(norms.normalized(x, 1e-6, count).double(), exact, rtol=1e-5, atol=1e-5)


def test_another_order_of_pytorch_is_called_from_python(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "lanes", lambda: 0)
    norm, linear = nn.LayerNorm(64), tw.nn.Int8Linear.from_float(nn.Linear(64, 64))
    fast, x = Replays(lambda x: linear(norm(linear(x)))), torch.randn(5, 64)
    with torch.no_grad():
        results = [fast(x) for _ in range(4)]
        assert all(torch.equal(y, linear(norm(linear(x)))) for y in results)
    assert fast.replays and fast.replays[0].c_calls == 2


def test_what_another_implementation_serves_is_called_from_python(isa: str) -> None:
    linear, x = tw.nn.Int8Linear.from_float(nn.Linear(64, 64)), torch.randn(5, 64)
    fast = Replays(lambda x: linear(linear(x).relu()))
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        assert fast.replays[0].native_steps == 3
        mine = Implementation(
            "mine", "int8_linear", lambda problem: None, "tilewright.kernels.int8_linear.reference:int8_linear"
        )
        register(mine, router.implementations("int8_linear")[0].name)
        try:
            results = [fast(x) for _ in range(4)]
            assert all(torch.equal(y, linear(linear(x).relu())) for y in results)
            assert fast.replays[-1].native_steps == 1
        finally:
            unregister("int8_linear", "mine")


def test_a_sum_that_is_read_later_is_kept(isa: str) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(33)

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = a + b
        return norm(total) + total

    a, b = torch.randn(2, 5, 33), torch.randn(2, 5, 33)
    y, _ = replayed(function, a, b)
    with torch.no_grad():
        assert torch.equal(y, function(a, b))


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 33, 65, 130])
@pytest.mark.parametrize("k, n", [(64, 64), (96, 40), (30, 130)], ids=["whole", "narrow", "ragged"])
def test_products_of_rows_that_are_quantised_once(isa: str, rows: int, k: int, n: int) -> None:
    torch.manual_seed(0)
    layers = [tw.nn.Int8Linear.from_float(nn.Linear(k, n), activation=a) for a in ("none", "gelu", "relu")]
    norm = nn.LayerNorm(k)

    def function(x: torch.Tensor) -> torch.Tensor:
        x = norm(x)
        return torch.cat([layers[0](x), layers[1](x), layers[2](x)], -1)

    x = torch.randn(1, rows, k)
    fast = Replays(function)
    with torch.no_grad():
        fast(x), fast(x)
        (replay,) = fast.replays
        # The norm quantises; the three products follow, and only the first waits for it.
        made = [steps.NORM, *[steps.INT8_PRODUCT] * 3, *[steps.ELEMENTWISE] * 3]
        assert [step.kind for step in replay.parts[0].steps] == made
        assert [step.independent for step in replay.parts[0].steps] == [0, 0, 1, 1, 0, 1, 1]
        assert torch.equal(fast(x), function(x))


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "int8": tw.nn.Int8Linear.from_float,
    "w4a8": tw.nn.Int8ActInt4WeightLinear.from_float,
    "w4a8, symmetric groups of 16": functools.partial(
        tw.nn.Int8ActInt4WeightLinear.from_float, group_size=16, symmetric=True
    ),
}


WEIGHT_ONLY: dict[str, Callable[..., nn.Module]] = {
    "int8 weight-only": tw.nn.Int8WeightOnlyLinear.from_float,
    "int4": tw.nn.Int4Linear.from_float,
    "int4, symmetric groups of 16": functools.partial(tw.nn.Int4Linear.from_float, group_size=16, symmetric=True),
    "int4 in bfloat16": functools.partial(tw.nn.Int4Linear.from_float, group_size=32, compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 40, 130])
@pytest.mark.parametrize("made", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_weight_only_products_of_rows_that_are_converted_once(
    isa: str, made: Callable[..., nn.Module], rows: int
) -> None:
    torch.manual_seed(0)
    layers = [made(nn.Linear(96, n), activation=act) for n, act in ((96, "none"), (40, "silu"), (130, "none"))]

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in layers], -1)

    fast, x = Replays(function), torch.randn(rows, 96)
    with torch.no_grad():
        fast(x), fast(x)
        kinds = [step.kind for step in fast.replays[0].parts[0].steps]
        served = router.route(tw.kernels.dispatch.problem.Problem(layers[0].op_name, rows, 96, 96, x.dtype)).name
        if served != "C kernel":
            pytest.skip(f"{served} serves {rows} rows here")
        assert kinds[:4] == [steps.WEIGHT_ONLY_CONVERT, *[steps.WEIGHT_ONLY_PRODUCT] * 3]
        x = torch.randn(rows, 96)
        assert torch.equal(fast(x), function(x))


@pytest.mark.parametrize("rows", [1, 7, 65, 130])
@pytest.mark.parametrize("group_sizes", [(32, 32, 32), (32, 16, 32)], ids=["one size", "two sizes"])
def test_w4a8_products_of_rows_that_are_quantised_once(isa: str, rows: int, group_sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    made = tw.nn.Int8ActInt4WeightLinear.from_float
    layers = [made(nn.Linear(96, n), group_size=size) for n, size in zip((96, 40, 130), group_sizes, strict=True)]

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in layers], -1)

    fast, x = Replays(function), torch.randn(rows, 96)
    with torch.no_grad():
        fast(x), fast(x)
        kinds = [step.kind for step in fast.replays[0].parts[0].steps]
        assert kinds.count(steps.INT4_PRODUCT) == 3 and kinds.count(steps.INT4_QUANTIZE) == len(set(group_sizes))
        x = torch.randn(rows, 96)
        assert torch.equal(fast(x), function(x))


@pytest.mark.parametrize("made", LAYERS.values(), ids=LAYERS)
def test_channel_scales_and_residuals(isa: str, made: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    scale = torch.rand(64) + 0.5
    first, second = made(nn.Linear(64, 48), channel_scale=scale), made(nn.Linear(64, 48), channel_scale=2 * scale)
    op = {"int8_linear": torch.ops.tilewright.int8_linear}.get(first.op_name, torch.ops.tilewright.int4_int8_linear)
    options = {} if first.op_name == "int8_linear" else {"group_size": first.group_size}

    def with_residual(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        held = {name: value for name, value in layer.named_buffers() if value is not None}
        named = {name.replace("weight_codes", "weight"): value for name, value in held.items()}
        return op(x, **named, bias=layer.bias, residual=residual, activation="relu", **options)

    def function(x: torch.Tensor) -> torch.Tensor:
        return with_residual(second, x, first(x))

    x = torch.randn(9, 64)
    y, replay = replayed(function, x)
    assert replay.native_steps == 2
    with torch.no_grad():
        assert torch.equal(y, function(x))


@pytest.mark.parametrize("made", [*LAYERS.values(), *WEIGHT_ONLY.values()], ids=[*LAYERS, *WEIGHT_ONLY])
def test_products_are_bit_for_bit_those_of_the_layers(isa: str, made: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    first, second = made(nn.Linear(100, 70), activation="gelu"), made(nn.Linear(70, 33, bias=False))
    function = nn.Sequential(first, second)
    for rows in (1, 7, 100):
        x = torch.randn(rows, 100)
        x[rows // 2, 3] = torch.nan if rows > 1 else 1.0
        y, _ = replayed(function, x)
        with torch.no_grad():
            expected = function(x)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert rows == 1 or (y.isnan().any(1).sum() == 1 and y[rows // 2].isnan().all())


@pytest.mark.parametrize(
    "batch, heads, kv_heads, length, width", [(1, 1, 1, 1, 8), (2, 3, 3, 9, 32), (3, 4, 2, 130, 24)]
)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_attention(isa: str, batch: int, heads: int, kv_heads: int, length: int, width: int, mask: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(batch, length, heads, width)
    k, v = (torch.randn(batch, length, kv_heads, width) for _ in range(2))
    given = {"none": None, "causal": None, "bool": torch.rand(batch, 1, 1, length) > 0.3}
    given["float"] = torch.randn(batch, heads, length, length)
    inputs = [q, k, v] if given[mask] is None else [q, k, v, given[mask]]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        assert call.supports(q, k, v, seen, mask == "causal")
        return call.attention(q, k, v, seen, mask == "causal", 0.2).transpose(1, 2).flatten(2) + 0.0

    fast = Replays(function)
    with torch.no_grad():
        for _ in range(2):
            fast(*[torch.randn_like(x) if x.is_floating_point() else ~x for x in inputs])
        assert fast.replays, fast.why_not
        y = fast(*inputs)
    wide = [t.double().transpose(1, 2).repeat_interleave(heads // t.shape[2], 1) for t in (q, k, v)]
    added = given[mask].double() if mask == "float" else given[mask]
    exact = F.scaled_dot_product_attention(*wide, attn_mask=added, is_causal=mask == "causal", scale=0.2)
    exact = exact.nan_to_num()  # queries that see nothing
    torch.testing.assert_close(y.double(), exact.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def _block() -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    torch.manual_seed(0)
    parts = nn.ModuleDict({name: tw.nn.Int8Linear.from_float(nn.Linear(48, 48)) for name in "qkvo"})
    parts["up"] = tw.nn.Int8Linear.from_float(nn.Linear(48, 96), activation="gelu")
    parts["down"] = tw.nn.Int8Linear.from_float(nn.Linear(96, 48))
    parts["first"], parts["second"] = nn.LayerNorm(48), nn.LayerNorm(48)

    def function(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (parts[name](x).view(*x.shape[:2], 4, 12).transpose(1, 2) for name in "qkv")
        y = call.attention(q, k, v).transpose(1, 2).flatten(2)
        x = parts["first"](parts["o"](y) + x)
        return parts["second"](parts["down"](parts["up"](x)) + x)

    return parts, function


@pytest.mark.parametrize("shape", [(1, 9), (7, 5), (3, 40)])
def test_a_block_is_one_call_whatever_the_number_of_threads(isa: str, shape: tuple[int, int]) -> None:
    _, function = _block()
    x, results = torch.randn(*shape, 48), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, replay = replayed(function, x)
            assert replay.c_calls == 1 and not replay.copied
            results.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with torch.no_grad():
        assert torch.equal(results[0], function(x))


def test_a_written_weight_is_seen(isa: str) -> None:
    parts, function = _block()
    x = torch.randn(2, 6, 48)
    fast = Replays(function)
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        parts["first"].weight.mul_(3)
        parts["up"].weight_scale.mul_(2)
        assert torch.equal(fast(x), function(x))
        for _ in range(3):
            assert torch.equal(fast(x), function(x))
