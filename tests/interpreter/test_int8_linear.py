"""W8A8 matrix products in the interpreter: int32 sums to the bit, the float32 epilogue within the float bar."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.interpreter.guard_page import guarded, survives
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import ACTIVATIONS
from tilewright.kernels.epilogue import finish
from tilewright.kernels.int8_linear import reference, triton_swapped, triton_tile

PLANS = {triton_swapped: triton_swapped.plan_swapped, triton_tile: triton_tile.plan_tile}
IMPLEMENTATIONS = pytest.mark.parametrize("module", list(PLANS), ids=lambda m: m.__name__.rsplit("_", 1)[1])
# Warps and stages mean nothing to the interpreter: one config for each shape of a tile.
FAMILIES = [
    pytest.param(module, config, id="-".join(str(value) for value in key))
    for module in PLANS
    for key, config in {
        tuple(vars(replace(config, num_warps=0, num_stages=0)).values())[:-2]: config for config in module.CONFIGS
    }.items()
]


@dataclass
class Case:
    """Arguments of ``int8_linear_quantized`` and its exact result."""

    x: torch.Tensor
    x_scale: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    activation: str = "none"

    @property
    def arguments(self) -> dict:
        return vars(self)

    def exact(self) -> torch.Tensor:
        total = self.x.double() @ self.weight.double().t()
        y = total * self.x_scale.double().unsqueeze(-1) * self.weight_scale.double()
        return finish(y, self.bias, self.residual, self.activation, torch.float64)


def make_case(m: int, n: int, k: int, dtype: torch.dtype, activation: str = "none", extras: bool = True) -> Case:
    generator = torch.Generator().manual_seed(m * 1000 + n + k)

    def integers(*shape):
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    def floats(*shape):
        return torch.randn(shape, generator=generator)

    bias, residual = (floats(n).to(dtype), floats(n, m).t().to(dtype)) if extras else (None, None)
    scales = floats(m).abs() * 1e-3 + 1e-3, floats(n).abs() * 1e-3 + 1e-3
    return Case(integers(m, k), scales[0], integers(n, k), scales[1], bias, residual, activation)


def run_config(module, config, case: Case, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((case.x.shape[0], case.weight.shape[0]), torch.nan, dtype=dtype)
    for launch in PLANS[module](**case.arguments, out=out, config=config):
        launch.run()
    return out


@pytest.mark.parametrize("module, config", FAMILIES)
@pytest.mark.parametrize("aligned", [True, False], ids=["even", "ragged"])
def test_every_config(module, config, aligned):
    block_k = getattr(config, "block_k", 128)
    m, n, k = (config.block_m, config.block_n, 2 * block_k) if aligned else (config.block_m - 3, config.block_n + 5, 99)
    case = make_case(m, n, k, torch.float32, extras=False)
    # Without bias and activation both compute one expression in float32, so nothing may differ.
    assert torch.equal(
        run_config(module, config, case, torch.float32), reference.int8_linear_quantized(**case.arguments)
    )
    case = make_case(m, n, k, torch.float16, "silu")
    out = run_config(module, config, case, torch.float16)
    plain = reference.int8_linear_quantized(**case.arguments, out_dtype=torch.float16)
    assert_close_as_plain(out, plain, case.exact())


def test_parts_of_k_beyond_the_end_add_nothing():
    config = replace(triton_swapped.CONFIGS[0], split_k=8)
    case = make_case(3, 20, 300, torch.float32, extras=False)
    out = run_config(triton_swapped, config, case, torch.float32)
    assert torch.equal(out, reference.int8_linear_quantized(**case.arguments))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(module, dtype, activation):
    case = make_case(5, 37, 50, dtype, activation)
    case.x_scale *= 30  # into the range where activations bend, and beyond
    out = module.int8_linear_quantized(**case.arguments, out_dtype=dtype)
    plain = reference.int8_linear_quantized(**case.arguments, out_dtype=dtype)
    assert_close_as_plain(out, plain, case.exact())


@IMPLEMENTATIONS
def test_extreme_sums_are_exact(module):
    k = 20_000
    x = torch.full((2, k), 127, dtype=torch.int8)
    x[1] = -127
    one = torch.ones(2)
    out = module.int8_linear_quantized(x, one, x, one)
    assert out.tolist() == [[127.0**2 * k, -(127.0**2) * k], [-(127.0**2) * k, 127.0**2 * k]]


@IMPLEMENTATIONS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_value_that_is_not_finite_marks_its_row_and_no_other(module, bad, activation):
    case = make_case(4, 21, 40, torch.float16, extras=False)
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).half()
    clean = module.int8_linear(x, case.weight, case.weight_scale, activation=activation)
    x[1, 7] = bad
    out = module.int8_linear(x, case.weight, case.weight_scale, activation=activation)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


@IMPLEMENTATIONS
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("n, k", [(17, 40), (1, 1), (0, 8), (8, 0)])
def test_any_shape(module, leading, n, k):
    case = make_case(1, n, k, torch.float16)
    x = torch.randn((*leading, k), generator=torch.Generator().manual_seed(0)).half()
    out = module.int8_linear(x, case.weight, case.weight_scale, bias=case.bias, activation="gelu")
    expected = reference.int8_linear(x, case.weight, case.weight_scale, bias=case.bias, activation="gelu")
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert torch.allclose(out, expected, rtol=2e-3, atol=1e-6)  # two neighbouring float16


@IMPLEMENTATIONS
def test_any_strides(module):
    case = make_case(6, 20, 32, torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator).t()
    weight = case.weight.t().contiguous().t()
    bias = torch.randn(40, generator=generator)[::2]
    residual = torch.randn(20, generator=generator).expand(6, 20)
    channel_scale = torch.rand(64, generator=generator)[::2] + 0.5
    options = {"bias": bias, "residual": residual, "channel_scale": channel_scale}
    ours, theirs = (run.int8_linear(x, weight, case.weight_scale, **options) for run in (module, reference))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    batch = x.expand(2, 6, 32)[:, ::2]
    ours = module.int8_linear(batch, weight, case.weight_scale, residual=residual[:1])
    assert torch.allclose(ours, reference.int8_linear(batch, weight, case.weight_scale, residual=residual[:1]))


def test_a_row_does_not_depend_on_its_batch():
    case = make_case(40, 30, 600, torch.float32, "gelu")
    whole = triton_swapped.int8_linear_quantized(**case.arguments)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40)):
        part = replace(case, x=case.x[rows], x_scale=case.x_scale[rows], residual=case.residual[rows])
        assert torch.equal(triton_swapped.int8_linear_quantized(**part.arguments), whole[rows])


def test_offsets_may_pass_two_to_the_31():
    # Row 2 of this view starts beyond 2^31; the pages between the rows are never touched, so they cost nothing.
    stride = 2**30 + 64
    memory = torch.empty(2 * stride + 64, dtype=torch.int8)
    x = torch.as_strided(memory, (3, 64), (stride, 1))
    case = make_case(3, 10, 64, torch.float32)
    x.copy_(case.x)
    case = replace(case, x=x)
    expected = reference.int8_linear_quantized(**case.arguments)
    for module in PLANS:
        assert torch.allclose(module.int8_linear_quantized(**case.arguments), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module, config", FAMILIES)
def test_nothing_outside_the_tensors_is_touched(module, config):
    case = make_case(5, 21, 150, torch.float16)
    case = Case(*(guarded(value) if isinstance(value, torch.Tensor) else value for value in case.arguments.values()))
    out = guarded(torch.zeros(5, 21))
    launches = PLANS[module](**case.arguments, out=out, config=config)
    assert survives(lambda: [launch.run() for launch in launches])


def test_an_unknown_activation_is_named():
    case = make_case(1, 4, 8, torch.float32, "swish")
    with pytest.raises(ValueError, match="'swish' is unknown"):
        triton_tile.int8_linear_quantized(**case.arguments)
