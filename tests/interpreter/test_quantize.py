"""Quantisation in the interpreter: every result must equal the reference to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter.guard_page import guarded, survives
from tilewright.kernels.quantize import reference
from tilewright.kernels.quantize.triton_quantize import CONFIGS, plan_quantize_per_row, quantize_per_row

DTYPES = [torch.float16, torch.float32]  # the interpreter rounds bfloat16 wrongly


def random_rows(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(m, k, generator=generator) * 3).to(dtype)


def assert_same(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1].nan_to_num(nan=-1.0), expected[1].nan_to_num(nan=-1.0))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.rows}x{c.block_k}{'' if c.one_block else '-looped'}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "channel_scale"])
def test_every_config(config, dtype, scaled):
    k = config.block_k - 3 if config.one_block else 2 * config.block_k + 5
    x = random_rows(config.rows + 1, k, dtype)
    x[0] = 0
    channel_scale = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5 if scaled else None
    q = torch.full(x.shape, 99, dtype=torch.int8)
    scale = torch.full(x.shape[:1], torch.nan)
    for launch in plan_quantize_per_row(x, channel_scale, q, scale, config):
        launch.run()
    assert_same((q, scale), reference.quantize_per_row(x, channel_scale))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_value_that_is_not_finite_marks_its_row_and_no_other(bad):
    x = random_rows(5, 70, torch.float16)
    x[2, 33] = bad
    q, scale = quantize_per_row(x)
    assert not torch.isfinite(scale[2])
    assert not q[2].any()
    assert torch.isfinite(scale[[0, 1, 3, 4]]).all()
    assert_same((q, scale), reference.quantize_per_row(x))


def test_ties_round_to_even_and_subnormals_clamp():
    tiny = 2.0**-149
    rows = [[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -125.5], [190 * tiny, tiny, -3 * tiny, -190 * tiny, 0, 0, 0, 0]]
    x = torch.tensor(rows, dtype=torch.float32)
    q, scale = quantize_per_row(x)
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2, 126, -126]
    assert q[1, 0] == 127
    assert q[1, 3] == -127
    assert_same((q, scale), reference.quantize_per_row(x))


@pytest.mark.parametrize("shape", [(70,), (1,), (1, 1), (2, 3, 70), (0, 8), (3, 0), (2, 0, 5), (0,)], ids=str)
def test_any_leading_shape(shape):
    x = random_rows(1, max(1, torch.Size(shape).numel()), torch.float32).flatten()[: torch.Size(shape).numel()]
    x = x.reshape(shape)
    assert_same(quantize_per_row(x), reference.quantize_per_row(x))


def test_any_strides():
    base = random_rows(40, 36, torch.float32)
    for x in (base.t(), base[::3, ::2], base[:1].expand(5, 36), base[:, :1].expand(40, 9), base.flip(1)[2:7]):
        assert_same(quantize_per_row(x), reference.quantize_per_row(x))
    channel_scale = base[:, 3].abs()
    assert_same(quantize_per_row(base.t(), channel_scale), reference.quantize_per_row(base.t(), channel_scale))


@pytest.mark.parametrize("k", [61, 5000])
def test_nothing_outside_the_tensors_is_touched(k):
    config = CONFIGS[0] if k == 61 else CONFIGS[-1]
    x = guarded(random_rows(3, k, torch.float16))
    channel_scale, q, scale = (
        guarded(torch.ones(k)),
        guarded(torch.empty(3, k, dtype=torch.int8)),
        guarded(torch.ones(3)),
    )
    assert survives(lambda: [launch.run() for launch in plan_quantize_per_row(x, channel_scale, q, scale, config)])
