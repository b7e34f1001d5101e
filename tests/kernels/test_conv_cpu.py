"""Convolutions on a CPU: the C kernels on every instruction set of this processor, oneDNN's, and replayed sequences."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_close_as_plain
from tilewright.kernels.conv2d import cpu as float_cpu
from tilewright.kernels.conv2d import reference as float_reference
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.recording import recorded
from tilewright.kernels.cpu.replay import Replay, Replays
from tilewright.kernels.int8_conv2d import cpu as int8_cpu
from tilewright.kernels.int8_conv2d import reference as int8_reference

quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EXACT = ("none", "relu", "relu6", "hardswish", "leaky_relu")


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a convolution: depthwise, grouped and plain ones, few channels and ragged ones, odd images."""
    groups = draw(st.sampled_from((1, 1, 2, 3, "depthwise")))
    if groups == "depthwise":
        groups = channels = out_channels = draw(st.sampled_from((2, 16, 40, 64, 130)))
    else:
        channels = groups * draw(st.sampled_from((1, 3, 4, 8, 20, 33)))
        out_channels = groups * draw(st.sampled_from((1, 5, 16, 24, 48, 80)))
    found = {
        "batch": draw(st.integers(1, 2)),
        "in_channels": channels,
        "height": draw(st.integers(1, 17)),
        "width": draw(st.integers(1, 17)),
        "out_channels": out_channels,
        "kernel": draw(st.sampled_from(((1, 1), (3, 3), (5, 5), (1, 3), (7, 7), (2, 4)))),
        "stride": draw(st.sampled_from(((1, 1), (2, 2), (3, 1)))),
        "padding": draw(st.sampled_from(((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (2, 2, 3, 3)))),
        "dilation": draw(st.sampled_from(((1, 1), (1, 1), (2, 1), (1, 2)))),
        "groups": groups,
    }
    geometry = ConvGeometry(**found)
    assume(geometry.out_height > 0 and geometry.out_width > 0)
    return found


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random [N, C, H, W], channels-last."""
    n, c, h, w = shape
    if dtype == torch.float32:
        return torch.randn(n, h, w, c).permute(0, 3, 1, 2)
    q = torch.randint(-127, 128, (n, h, w, c), dtype=torch.int8)
    q[:, ::2] = 127  # pairs of extreme products overflow 16 bits
    return (q if dtype == torch.int8 else (q.int() + 128).to(torch.uint8)).permute(0, 3, 1, 2)


def int8_arguments(sizes: dict[str, Any], x_dtype: torch.dtype, residual: str | None, **options: Any) -> dict[str, Any]:
    geometry = ConvGeometry(**sizes)
    x = image(geometry.batch, geometry.in_channels, geometry.height, geometry.width, dtype=x_dtype)
    added = {"int8": torch.int8, "uint8": torch.uint8, "float": torch.float32}.get(residual or "")
    return {
        "x": x.abs() if options.get("x_nonnegative") else x,
        "x_scale": 0.02,
        "weight": torch.randint(-127, 128, (geometry.out_channels, *geometry.kernel, geometry.group_channels)).char(),
        "weight_scale": torch.rand(geometry.out_channels) * 0.01 + 0.001,
        "bias": torch.randn(geometry.out_channels),
        "residual": None if added is None else image(*geometry.out_shape, dtype=added),
        "residual_scale": 0.03,
        **{name: sizes[name] for name in ("stride", "padding", "dilation", "groups")},
        **options,
    }


def needs_c() -> None:
    reason = conv_steps.why_no_kernels()
    if reason:
        pytest.skip(reason)


ONE_TAP = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
#: A float residual has a scale too. Whole vectors and ragged ones have epilogues of their own, as has each result.
FLOAT_RESIDUAL = {"x": "int8", "residual": "float", "activation": "none", "threads": 1, "seed": 0, "zeros": (0, 0, 3)}
ZERO_POINTS = st.sampled_from((0, -127, -3, 64, 127))
STRIDED_ROW = {"height": 1, "width": 4, "stride": (2, 2), "padding": (0, 1, 0, 1), "groups": 2}


@quick
@example(
    sizes={**ONE_TAP, "batch": 1, "in_channels": 2, "out_channels": 2, **STRIDED_ROW}, out=torch.int8, **FLOAT_RESIDUAL
)
@example(
    sizes={**ONE_TAP, "batch": 1, "in_channels": 4, "height": 3, "width": 5, "out_channels": 48},
    out=torch.float32,
    **FLOAT_RESIDUAL,
)
@given(
    sizes=windows(),
    x=st.sampled_from(("int8", "nonnegative", "uint8")),
    residual=st.sampled_from((None, "int8", "uint8", "float")),
    out=st.sampled_from((torch.int8, torch.uint8, torch.float32)),
    activation=st.sampled_from(EXACT),
    threads=st.sampled_from((1, 2)),
    seed=st.integers(0, 1000),
    zeros=st.tuples(ZERO_POINTS, ZERO_POINTS, ZERO_POINTS),
)
def test_int8_is_the_reference_bit_for_bit(
    isa: str,
    sizes: dict[str, Any],
    x: str,
    residual: str | None,
    out: Any,
    activation: str,
    threads: int,
    seed: int,
    zeros: tuple[int, int, int],
) -> None:
    """zeros: the zero points of x, of an integer residual, of an integer result."""
    needs_c()
    torch.manual_seed(seed)
    depth = ConvGeometry(**sizes).taps * sizes["in_channels"] // sizes["groups"]
    arguments = int8_arguments(
        sizes,
        torch.uint8 if x == "uint8" else torch.int8,
        residual,
        activation=activation,
        negative_slope=0.1,
        out_scale=None if out == torch.float32 else 0.05 * depth**0.5,
        out_dtype=out,
        x_nonnegative=x == "nonnegative",
        x_zero_point=0 if x == "nonnegative" else zeros[0],
        residual_zero_point=zeros[1] if residual in ("int8", "uint8") else 0,
        out_zero_point=0 if out == torch.float32 else zeros[2],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = int8_cpu.int8_conv2d_fused(**arguments)
    finally:
        torch.set_num_threads(before)
    expected = int8_reference.int8_conv2d_fused(**arguments)
    assert torch.equal(y, expected) and y.stride() == expected.stride()


@pytest.mark.parametrize("channels, kernel", [(512, 3), (2048, 3), (2048, 5)])
def test_int8_windows_may_be_deep(isa: str, channels: int, kernel: int) -> None:
    """Where windows are copied before they are multiplied, of these only some pixels' have room, or one's."""
    needs_c()
    size = {"batch": 2, "in_channels": channels, "height": 4, "width": 3, "out_channels": 17}
    edges = {"kernel": (kernel, kernel), "padding": (kernel // 2,) * 4}
    arguments = int8_arguments(
        {**ONE_TAP, **size, **edges}, torch.int8, None, activation="relu", out_dtype=torch.float32
    )
    assert torch.equal(int8_cpu.int8_conv2d_fused(**arguments), int8_reference.int8_conv2d_fused(**arguments))


def test_ties_are_rounded_to_even(isa: str) -> None:
    needs_c()
    x = torch.arange(-127, 128, dtype=torch.int8).repeat(16, 1).t().reshape(1, 15, 17, 16).permute(0, 3, 1, 2)
    arguments = {"x": x, "x_scale": 1.0, "weight": torch.eye(16, dtype=torch.int8).view(16, 1, 1, 16)}
    arguments |= {"weight_scale": torch.ones(16), "out_scale": 2.0}
    y = int8_cpu.int8_conv2d_fused(**arguments)
    assert torch.equal(y[0, 0].flatten().int(), torch.round(torch.arange(-127, 128) / 2).int())
    shifted = int8_cpu.int8_conv2d_fused(**arguments, out_zero_point=-3)
    assert torch.equal(shifted, y - 3), "a tie is rounded before the zero point is added"


def test_silu_differs_by_one_step_and_only_beside_a_tie() -> None:
    needs_c()
    torch.manual_seed(0)
    sizes = {"batch": 2, "in_channels": 24, "height": 30, "width": 31, "out_channels": 96, "kernel": (1, 1)}
    options = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
    arguments = int8_arguments({**sizes, **options}, torch.int8, None, activation="silu")
    exact = int8_reference.int8_conv2d_fused(**arguments).double() / 0.7
    y = int8_cpu.int8_conv2d_fused(**arguments, out_scale=0.7).double()
    expected = int8_reference.int8_conv2d_fused(**arguments, out_scale=0.7).double()
    other = y != expected
    beside = ((exact - exact.floor()) - 0.5).abs() < 127 * 2.0**-21
    assert (y - expected).abs().max() <= 1
    assert not (other & ~beside).any()


@quick
@given(sizes=windows(), residual=st.booleans(), activation=st.sampled_from((*EXACT, "silu")), seed=st.integers(0, 99))
def test_float32_is_as_good_as_pytorch(
    isa: str, sizes: dict[str, Any], residual: bool, activation: str, seed: int
) -> None:
    needs_c()
    torch.manual_seed(seed)
    check_float(float_cpu.conv2d_fused, sizes, residual, activation)


#: Results that a comparison of errors needs at least: the plain expression may err by nothing in a few of them.
ENOUGH = 5000


def check_float(function: Any, sizes: dict[str, Any], residual: bool, activation: str) -> None:
    geometry = ConvGeometry(**sizes)
    rest = {name: sizes[name] for name in ("stride", "padding", "dilation", "groups")}
    rest |= {"activation": activation, "negative_slope": 0.1}
    found: list[tuple[torch.Tensor, ...]] = []
    while sum(y.numel() for y, _, _ in found) < ENOUGH:
        x = image(geometry.batch, geometry.in_channels, geometry.height, geometry.width)
        weight = torch.randn(geometry.out_channels, *geometry.kernel, geometry.group_channels)
        tensors = [x, weight, torch.randn(geometry.out_channels), image(*geometry.out_shape) if residual else None]
        wide = [None if tensor is None else tensor.double() for tensor in tensors]
        y, plain = function(*tensors, **rest), float_reference.conv2d_fused(*tensors, **rest)
        assert y.stride() == plain.stride()
        found.append((y, plain, float_reference.conv2d_fused(*wide, **rest)))
    assert_close_as_plain(*(torch.cat([part.flatten() for part in parts]) for parts in zip(*found, strict=True)))


@pytest.mark.parametrize(
    "channels, kernel, out_channels", [(33, (5, 5), 24), (8, (2, 4), 5), (200, (3, 3), 16)], ids=["825", "64", "1800"]
)
def test_long_sums_of_floats_are_as_good_as_pytorchs(
    isa: str, channels: int, kernel: tuple[int, int], out_channels: int
) -> None:
    needs_c()
    torch.manual_seed(0)
    sizes = {**ONE_TAP, "batch": 1, "in_channels": channels, "height": 10, "width": 6, "out_channels": out_channels}
    for _ in range(3):
        check_float(float_cpu.conv2d_fused, {**sizes, "kernel": kernel}, False, "none")


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu", "relu6", "hardswish", "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_onednn_float_is_as_good_as_pytorch(residual: bool, activation: str) -> None:
    if float_cpu.why_no_onednn():
        pytest.skip(float_cpu.why_no_onednn())
    torch.manual_seed(0)
    sizes = {"batch": 2, "in_channels": 24, "height": 9, "width": 11, "out_channels": 40, "kernel": (3, 3)}
    window = {"stride": (2, 1), "padding": (0, 1, 1, 1), "dilation": (1, 1), "groups": 2}
    check_float(float_cpu.onednn_conv2d_fused, {**sizes, **window}, residual, activation)


@pytest.mark.parametrize("x", ["signed", "nonnegative", "with a zero point"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_onednn_int8_is_the_reference_bit_for_bit(activation: str, x: str) -> None:
    if int8_cpu.why_no_qconv():
        pytest.skip(int8_cpu.why_no_qconv())
    torch.manual_seed(0)
    sizes = {"batch": 2, "in_channels": 24, "height": 9, "width": 11, "out_channels": 40, "kernel": (3, 3)}
    window = {"stride": (2, 1), "padding": (0, 1, 1, 1), "dilation": (1, 1), "groups": 2}
    arguments = int8_arguments(
        {**sizes, **window}, torch.int8, "int8", activation=activation, out_scale=0.7, x_nonnegative=x == "nonnegative"
    )
    if x == "with a zero point":
        arguments |= {"x_zero_point": -127, "residual_zero_point": 9, "out_zero_point": -30}
    y = int8_cpu.onednn_int8_conv2d_fused(**arguments)
    assert torch.equal(y, int8_reference.int8_conv2d_fused(**arguments))


def test_nan_and_infinity_stay_where_they_are(isa: str) -> None:
    needs_c()
    x, weight = image(1, 16, 8, 8), torch.randn(32, 3, 3, 16)
    x[0, 3, 1, 1], x[0, 5, 6, 6] = float("nan"), float("inf")
    for activation in ("none", "relu", "relu6", "silu", "hardswish"):
        y = float_cpu.conv2d_fused(x, weight, padding=(1, 1, 1, 1), activation=activation)
        clean = float_cpu.conv2d_fused(x.nan_to_num(0, 0), weight, padding=(1, 1, 1, 1), activation=activation)
        assert y[:, :, :3, :3].isnan().all()
        assert torch.equal(y[:, :, 3:5, :5], clean[:, :, 3:5, :5]) and clean.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 17, 19), (1, 64, 9, 9), (7, 33), (3, 4, 5), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])
def test_quantising_is_the_reference_bit_for_bit(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    needs_c()
    x = torch.randn(shape) * 3
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x.view(-1)[3:5] = torch.tensor([0.03125 * 2.5, -0.03125 * 3.5])
    for given_x in (x, x.transpose(0, -1)):
        for zero_point in (0, -127, 10):
            y = int8_cpu.quantize_per_tensor(given_x, 0.03125, dtype, zero_point)
            assert torch.equal(y, int8_reference.quantize_per_tensor(given_x, 0.03125, dtype, zero_point))


@pytest.mark.parametrize("shape", [(2, 3, 17, 19), (3, 64, 9, 9), (2, 1, 5, 37), (7, 33), (3, 4, 5), (5,)], ids=str)
def test_marks_are_the_references(isa: str, shape: tuple[int, ...]) -> None:
    needs_c()
    clean = torch.randn(shape)
    for layout in (clean, clean.transpose(0, -1).contiguous().transpose(0, -1)):
        for bad in (float("nan"), float("inf"), -float("inf"), 3e38):
            for place in {0, clean.numel() // 2, clean.numel() - 1}:
                x = layout.clone()
                x[tuple(int(i) for i in torch.unravel_index(torch.tensor(place), shape))] = bad
                for dims in range(2 if x.dim() == 4 else x.dim()):
                    q, marks = int8_cpu.quantize_per_tensor_marked(x, 0.03125, dims)
                    expected, expected_marks = int8_reference.quantize_per_tensor_marked(x, 0.03125, dims)
                    assert torch.equal(q, expected)
                    assert torch.equal(marks.isnan(), expected_marks.isnan())
                    assert torch.equal(marks.nan_to_num(0.0), expected_marks.nan_to_num(0.0))


def test_changed_weights_and_biases_are_noticed() -> None:
    needs_c()
    x, weight, bias = image(1, 16, 8, 8), torch.randn(16, 1, 1, 16), torch.randn(16)
    first = float_cpu.conv2d_fused(x, weight, bias)
    bias.add_(1)
    torch.testing.assert_close(float_cpu.conv2d_fused(x, weight, bias), first + 1)
    weight.zero_()
    assert torch.equal(float_cpu.conv2d_fused(x, weight, bias), bias.view(1, 16, 1, 1).expand(1, 16, 8, 8))


def test_reasons_name_what_is_in_the_way() -> None:
    needs_c()
    geometry = ConvGeometry(1, 64, 8, 8, 64, (1, 1))
    assert "nothing" in (conv_steps.why_not_conv(ConvGeometry(0, 64, 8, 8, 64, (1, 1)), torch.float32) or "")
    wide = ConvGeometry(1, 70_000, 8, 8, 64, (1, 1))
    assert "overflow" in (conv_steps.why_not_conv(wide, torch.int8) or "")
    assert "bytes" in (conv_steps.why_not_conv(wide, torch.float32) or "")
    assert conv_steps.why_not_conv(geometry, torch.int8) is None


# ---- replays
class Network:
    """A stem, a depthwise layer with squeeze-and-excite, a residual, a pool, a mean and a linear layer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.stem, self.wide = torch.randn(16, 3, 3, 3), torch.randn(48, 1, 1, 16) / 4
        self.depth, self.narrow = torch.randn(48, 3, 3, 1), torch.randn(16, 1, 1, 48) / 7
        self.gate, self.head, self.bias = torch.randn(48, 1, 1, 48) / 7, torch.randn(10, 16), torch.randn(10)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        conv = torch.ops.tilewright.conv2d_fused
        x = conv(x, self.stem, None, None, [2, 2], [1, 1, 1, 1], [1, 1], 1, "relu")
        x = F.max_pool2d(x, 3, 2, 1)
        y = conv(x, self.wide, None, None, [1, 1], [0, 0, 0, 0], [1, 1], 1, "silu")
        y = conv(y, self.depth, None, None, [1, 1], [1, 1, 1, 1], [1, 1], 48, "hardswish")
        y = y * torch.sigmoid(conv(y.mean((2, 3), keepdim=True), self.gate))
        x = torch.tanh(conv(y, self.narrow, None, x))
        return F.linear(F.dropout(x, 0.5, False).mean((2, 3)).flatten(1), self.head, self.bias), "kept"


def replayed(network: Any, x: torch.Tensor) -> tuple[Replays, Replay]:
    needs_c()
    fast = Replays(network)
    with torch.inference_mode():
        for _ in range(2):
            fast(x)
    found = fast.replays
    assert found, fast.why_not
    return fast, found[0]


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_a_replay_gives_what_the_function_gives(batch: int) -> None:
    network, x = Network(), torch.randn(batch, 3, 33, 29)
    fast, replay = replayed(network, x)
    for x in (torch.randn(batch, 3, 33, 29), torch.randn(batch, 3, 33, 29)):
        (y, word), (expected, _) = fast(x), network(x)
        torch.testing.assert_close(y, expected)
        assert word == "kept"
    assert replay.python_steps == ["aten.tanh.default"]


@torch.inference_mode()
def test_results_of_a_replay_are_tensors_of_their_own() -> None:
    x = torch.randn(1, 3, 33, 29)
    fast, _ = replayed(Network(), x)
    first = fast(x)[0]
    kept = first.clone()
    fast(torch.randn_like(x))
    assert torch.equal(first, kept)


def test_a_replay_notices_changed_weights_and_gradients() -> None:
    network, x = Network(), torch.randn(1, 3, 33, 29)
    fast, _ = replayed(network, x)
    network.bias.add_(1)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x)[0], network(x)[0])
    x.requires_grad_()
    fast(x)[0].sum().backward()
    assert x.grad is not None


@torch.inference_mode()
def test_a_replay_is_safe_in_threads() -> None:
    network, x = Network(), torch.randn(1, 3, 33, 29)
    fast, _ = replayed(network, x)
    inputs = [torch.randn_like(x) for _ in range(4)]
    results: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        with torch.inference_mode():
            results[i] = [fast(inputs[i])[0] for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        for y in results[i]:
            torch.testing.assert_close(y, network(inputs[i])[0])


@torch.inference_mode()
def test_int8_stays_int8_in_a_replay() -> None:
    needs_c()
    torch.manual_seed(0)
    weights = [torch.randint(-127, 128, (16, 3, 3, 16), dtype=torch.int8) for _ in range(2)]
    scale = torch.full((16,), 0.01)
    pool = recorded("max_pool")(lambda q: F.max_pool2d(q.float(), 2).to(torch.int8))

    def network(x: torch.Tensor) -> torch.Tensor:
        conv = functools.partial(torch.ops.tilewright.int8_conv2d_fused, padding=[1, 1, 1, 1], activation="relu")
        q = torch.ops.tilewright.quantize_per_tensor(x, 0.02)
        q = conv(q, 0.02, weights[0], scale, out_scale=0.5)
        return conv(q, 0.5, weights[1], scale, residual=q, residual_scale=0.5, out_scale=20.0)

    x = torch.randn(2, 16, 9, 7)
    fast, replay = replayed(network, x)
    other = torch.randn(2, 16, 9, 7)
    assert torch.equal(fast(other), network(other)) and replay.python_steps == []
    assert pool(network(x)).dtype == torch.int8


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: x + torch.rand_like(x), "random"),
        (lambda x: x.abs().cumsum_(0), "no operator of it has a C kernel"),
        (lambda x: torch.tanh(x), "no operator of it has a C kernel"),
        (lambda x: x[:1], "returns an input"),
    ],
    ids=["random", "in place", "nothing native", "a view"],
)
@torch.inference_mode()
def test_what_cannot_be_replayed_is_called_and_says_why(function: Any, words: str) -> None:
    needs_c()
    fast, x = Replays(function), torch.randn(2, 3)
    for _ in range(3):
        assert fast(x).shape[1:] == (3,)
    assert words in (fast.why_not or "")
