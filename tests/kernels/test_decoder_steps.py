"""Steps of decoders: root mean square norms, and operations on single numbers, on every instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.kernels.replays import replayed
from tilewright.kernels.cpu import norms, steps
from tilewright.kernels.cpu.replay import Replays

REASON = steps.why_no_kernels()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def isa(isa: str) -> str:
    """Every instruction set that the processor has vectors for."""
    if not steps.lanes():
        pytest.skip(f"needs vectors, which {isa} has not")
    return isa


def root_mean_square(
    x: torch.Tensor, weight: torch.Tensor | None = None, offset: float | None = None, epsilon: float = 1e-6
) -> torch.Tensor:
    """As Llama and its kin write it; offset: as Gemma does."""
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    if weight is None:
        return x
    return weight * x if offset is None else x * (offset + weight)


SQUARES_REASON = None if REASON or norms.square_lanes() else "this PyTorch adds squares in an unknown order"
needs_squares = pytest.mark.skipif(SQUARES_REASON is not None, reason=str(SQUARES_REASON))


@needs_squares
@pytest.mark.parametrize(
    "rows, columns", [(1, 16), (3, 17), (2, 64), (5, 127), (70, 384), (1, 896), (9, 1030), (2, 5000)]
)
@pytest.mark.parametrize("offset", [None, 1.0], ids=["weight", "one more than the weight"])
def test_root_mean_square_norm(isa: str, rows: int, columns: int, offset: float | None) -> None:
    torch.manual_seed(0)
    weight, x, residual = torch.randn(columns), torch.randn(rows, columns), torch.randn(rows, columns)
    function = functools.partial(root_mean_square, weight=weight, offset=offset)
    y, replay = replayed(lambda a, b: function(a + b), x, residual)
    assert len(replay.parts[0].steps) == 1 and replay.native_steps == 7 + (offset is not None)
    assert torch.equal(y, function(x + residual)) and torch.equal(replayed(function, x)[0], function(x))
    assert torch.equal(replayed(root_mean_square, x)[0], root_mean_square(x))
    factor = weight.double() + (offset or 0)
    total = (x + residual).double()
    exact = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * factor
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@needs_squares
@pytest.mark.parametrize("columns", [16, 31, 32, 33, 129, 256, 511, 512, 2048, 4100, 11008, 32767])
def test_squares_are_added_as_pytorch_does(isa: str, columns: int) -> None:
    torch.manual_seed(columns)
    x = torch.randn(3, columns) * 7
    x[1, columns // 2] = torch.nan
    y, expected = replayed(root_mean_square, x)[0], root_mean_square(x)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("count", norms.LANES)
def test_squares_in_either_number_of_lanes_are_right(isa: str, count: int) -> None:
    torch.manual_seed(0)
    for columns in (16, 40, 300, 4100):
        x = torch.randn(6, columns)
        exact = root_mean_square(x.double())
        found = norms.normalized(x, 1e-6, count, kind=steps.RMS_NORM)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@needs_squares
def test_what_is_read_of_a_root_mean_square_norm_is_kept(isa: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48)

    def total_is_read(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = a + b
        return root_mean_square(total, weight) + total

    def square_is_read(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        square = (a + b).pow(2)
        return (a + b) * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * weight + square

    a, b = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    assert torch.equal(replayed(total_is_read, a, b)[0], total_is_read(a, b))
    fast = Replays(square_is_read)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(a, b), square_is_read(a, b))


@needs_squares
@pytest.mark.parametrize("layer", [tw.nn.Int8Linear, tw.nn.Int8ActInt4WeightLinear])
def test_a_weight_of_a_root_mean_square_norm_that_is_made_is_not_taken_for_a_constant(isa: str, layer: Any) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(4, 64), torch.randn(3, 64)
    linear = layer.from_float(nn.Linear(64, 64))
    fast = Replays(lambda x, weight: linear(root_mean_square(x, weight[0] * 2)))
    with torch.no_grad():
        for weight in weights.split(1):
            for _ in range(3):
                assert torch.equal(fast(x, weight), linear(root_mean_square(x, weight[0] * 2)))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """A rotary embedding of x [batch, heads, length, width]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rotated_in_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As in GPT-J, of neighbouring columns."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


@pytest.mark.parametrize("turn", [rotated, rotated_in_pairs], ids=["halves", "pairs"])
@pytest.mark.parametrize("batch, heads, length, width", [(1, 4, 1, 16), (2, 3, 5, 10), (1, 2, 40, 64)])
def test_rotary_embeddings(
    isa: str, turn: Callable[..., torch.Tensor], batch: int, heads: int, length: int, width: int
):
    torch.manual_seed(0)
    x, angle = torch.randn(batch, length, heads * width), torch.randn(1, length, width)

    def function(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        x = x.view(batch, length, heads, width).transpose(1, 2)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        return turn(x, cos, sin)

    fast = Replays(function)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn_like(x)
            assert torch.equal(fast(x, angle), function(x, angle))
    assert fast.replays, fast.why_not
    if turn is rotated or batch * heads * length * width <= 4096:
        called = [name for name in fast.replays[0].python_steps if name not in ("aten.cos.default", "aten.sin.default")]
        assert called == ([] if turn is rotated else ["aten.stack.default"]), called


OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "product with a number": lambda a, b: (a * 1.7) * b,
    "sum with a number": lambda a, b: (a + 0.1) - b,
    "opposite": lambda a, b: -a - b,
    "square": lambda a, b: a.pow(2) - b,
    "parts": lambda a, b: torch.cat([a, a * b, a], -1),
    "parts of another dimension": lambda a, b: torch.cat([a, a * b], 1),
    "dense": lambda a, b: (a * b).transpose(1, 2).clone(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 5), (2, 3, 4, 33), (1, 8, 70, 64), (1, 1, 1, 9000)])
@pytest.mark.parametrize("other", ["alike", "a row", "a column", "transposed"])
def test_single_numbers(isa: str, name: str, shape: tuple[int, ...], other: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(shape), torch.randn(shape)
    if other == "a row":
        b = b[:1, :1, :1]
    elif other == "a column":
        b = b[..., :1]
    elif other == "transposed":
        a, b = (torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2) for _ in range(2))
    a[0, 0, 0, :2] = torch.tensor([-0.0, torch.nan]) if other == "alike" else torch.tensor([0.0, -0.0])
    function = OPERATIONS[name]
    fast = Replays(function)
    with torch.no_grad():
        for _ in range(3):
            y, expected = fast(a, b), function(a, b)
            assert y.stride() == expected.stride() and torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.nan_to_num(), expected.nan_to_num())
            assert torch.equal(y.signbit() & ~y.isnan(), expected.signbit() & ~expected.isnan())
    assert fast.replays and not fast.replays[0].python_steps, fast.why_not


def test_one_thread_goes_on_without_waiting(isa: str) -> None:
    x = torch.randn(1, 64)
    _, replay = replayed(lambda x: -(x * 2) + x, x)
    assert [step.independent for step in replay.parts[0].steps] == [0, 1, 1]
    _, replay = replayed(lambda x: -(x * 2) + x, torch.randn(100, 640))
    assert [step.independent for step in replay.parts[0].steps] == [0, 0, 0]

    def reads_what_others_copied(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y], -1)[:, :64] * 2 + y

    _, replay = replayed(reads_what_others_copied, torch.randn(1, 9000), torch.randn(1, 64))
    assert [step.independent for step in replay.parts[0].steps] == [0, 1, 0, 1]
