"""Norms fused with quantisation in the interpreter.

The norm is float arithmetic, whose last bits depend on the order of a sum; where a quotient sits on a tie, that decides
between two neighbouring integers. So scales are held to the float bar and integers to one step, which few may take.
"""

from __future__ import annotations

import pytest
import torch

from tests.interpreter.guard_page import guarded, survives
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.norm_quantize import reference
from tilewright.kernels.norm_quantize.triton_norm_quantize import (
    CONFIGS,
    layer_norm_quantize,
    plan_norm_quantize,
    rms_norm_quantize,
)

DTYPES = [torch.float16, torch.float32]  # the interpreter rounds bfloat16 wrongly


def random_rows(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(k)) * 3 + 1).to(dtype)


def exact_scale(x, weight, bias, eps, subtract_mean) -> torch.Tensor:
    v = x.double()
    if subtract_mean:
        v = v - v.mean(-1, keepdim=True)
    v = v / (v.square().mean(-1, keepdim=True) + eps).sqrt()
    v = v if weight is None else v * weight.double()
    v = v if bias is None else v + bias.double()
    return v.abs().amax(-1) / 127


def assert_as_good(actual, plain, exact) -> None:
    q, scale = actual
    assert_close_as_plain(scale, plain[1], exact)
    steps = (q.int() - plain[0].int()).abs()
    assert steps.max() <= 1, f"{steps.max()} steps from the reference"
    assert (steps > 0).float().mean() < 2e-3


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.rows}x{c.block_k}{'' if c.one_block else '-looped'}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_every_config(config, dtype, subtract_mean, affine):
    k = config.block_k - 3 if config.one_block else 2 * config.block_k + 5
    x = random_rows(config.rows + 1, k, dtype)
    weight = random_rows(1, k, dtype)[0] if affine else None
    bias = random_rows(1, k + 1, dtype)[0, :k] if affine and subtract_mean else None
    q = torch.full(x.shape, 99, dtype=torch.int8)
    scale = torch.full(x.shape[:1], torch.nan)
    for launch in plan_norm_quantize(x, weight, bias, 1e-5, subtract_mean, q, scale, config):
        launch.run()
    if subtract_mean:
        plain = reference.layer_norm_quantize(x, weight, bias, 1e-5)
    else:
        plain = reference.rms_norm_quantize(x, weight, 1e-5)
    assert_as_good((q, scale), plain, exact_scale(x, weight, bias, 1e-5, subtract_mean))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("norm", [layer_norm_quantize, rms_norm_quantize])
def test_a_value_that_is_not_finite_marks_its_row_and_no_other(bad, norm):
    x = random_rows(5, 70, torch.float16)
    clean = norm(x)
    x[2, 33] = bad
    q, scale = norm(x)
    assert not torch.isfinite(scale[2])
    assert not q[2].any()
    others = [0, 1, 3, 4]
    assert torch.equal(q[others], clean[0][others])
    assert torch.equal(scale[others], clean[1][others])


def test_a_constant_row_gives_the_bias():
    x = torch.full((2, 40), 3.0)
    bias = torch.linspace(-1, 1, 40)
    q, scale = layer_norm_quantize(x, None, bias)
    expected = reference.layer_norm_quantize(x, None, bias)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    q, scale = layer_norm_quantize(x)
    assert not q.any()
    assert (scale == 1).all()


@pytest.mark.parametrize("shape", [(70,), (2, 3, 70), (0, 8), (3, 0)], ids=str)
def test_any_leading_shape(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(rms_norm_quantize(x), reference.rms_norm_quantize(x), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if x.numel():
        plain = reference.layer_norm_quantize(x)
        assert_as_good(layer_norm_quantize(x), plain, exact_scale(x, None, None, 1e-5, True))


def test_any_strides():
    base = random_rows(40, 36, torch.float32)
    for x in (base.t(), base[::3, ::2], base[:1].expand(5, 36)):
        weight = base.flatten()[: 2 * x.shape[1] : 2]
        assert_as_good(
            rms_norm_quantize(x, weight),
            reference.rms_norm_quantize(x, weight),
            exact_scale(x, weight, None, 1e-6, False),
        )


@pytest.mark.parametrize("k", [61, 5000])
def test_nothing_outside_the_tensors_is_touched(k):
    config = CONFIGS[0] if k == 61 else CONFIGS[-1]
    x, weight, bias = guarded(random_rows(3, k, torch.float16)), guarded(torch.ones(k)), guarded(torch.ones(k))
    q, scale = guarded(torch.empty(3, k, dtype=torch.int8)), guarded(torch.ones(3))
    launches = plan_norm_quantize(x, weight, bias, 1e-5, True, q, scale, config)
    assert survives(lambda: [launch.run() for launch in launches])
