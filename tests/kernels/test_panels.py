"""Weights widened to float32 by a C kernel and multiplied by the library, on every instruction set there is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.problems import Case, float64, make, plain
from tests.tolerance import assert_close_as_plain
from tilewright import autotune
from tilewright.kernels import tuning
from tilewright.kernels.cpu import native, panels
from tilewright.kernels.dispatch.router import implementations
from tilewright.kernels.formats import int4
from tilewright.nn import Int4Linear, Int8WeightOnlyLinear

NAME = "dequantised blocks"
DTYPES = tuple(native.DTYPES)
OPS = ("int8_weight_only_linear", "int4_linear")


def function(op: str) -> Any:
    return next(one.function for one in implementations(op) if one.name == NAME)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    op=st.sampled_from(OPS),
    m=st.integers(4, 40),
    n=st.integers(8, 150),
    k=st.integers(1, 600),
    group_size=st.sampled_from((2, 32, 48, 128, None)),
    dtype=st.sampled_from(DTYPES),
    compute_dtype=st.sampled_from((None, *DTYPES)),
    scale_dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(("none", "relu", "gelu")),
    flags=st.sets(st.sampled_from(("symmetric", "bias", "residual"))),
    panel=st.sampled_from((1 << 12, 1 << 26)),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(
    isa: str, op: str, k: int, group_size: int | None, flags: set[str], panel: int, seed: int, **options: Any
):
    case = Case(
        op, k=k, group_size=group_size or k, **options, **{flag: flag in flags for flag in ("symmetric", "bias")}
    )
    case = case.with_(residual="residual" in flags)
    arguments = make(case, seed)
    before, panels.PANEL_BYTES = panels.PANEL_BYTES, panel
    try:
        y = function(op)(**arguments)
    finally:
        panels.PANEL_BYTES = before
    assert y.dtype == case.dtype
    assert_close_as_plain(y, plain(case, arguments), float64(case, arguments))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, k, group", [(8, 131, 131), (4, 96, 32), (4, 88, 24), (4, 131, 131), (4, 1000, 200)])
@pytest.mark.parametrize("threads", [1, 3])
def test_widened_weights_are_rounded_once(isa: str, bits: int, k: int, group: int, symmetric: bool, threads: int):
    n, first, count = 24, 5, 13
    groups = -(-k // group)
    scale = torch.rand(n, groups)
    if bits == 8:
        weight, zero = torch.randint(-127, 128, (n, k), dtype=torch.int8), None
        expected = weight.float() * scale
    else:
        weight = torch.randint(-(2**31), 2**31 - 1, (n, -(-k // 8)), dtype=torch.int32)
        zero = None if symmetric else torch.randint(-(2**31), 2**31 - 1, (n // 8, groups), dtype=torch.int32)
        expected = int4.unpack_centred(weight, zero, group, k).float() * scale.repeat_interleave(group, 1)[:, :k]
    to = torch.full((count + 1, k), float("nan"))
    zeros = None if zero is None else zero.data_ptr()
    sizes = first, count, k, groups, group, weight[0].numel() * weight.element_size()
    native.function("dequantize")(bits, weight.data_ptr(), scale.data_ptr(), zeros, *sizes, to.data_ptr(), threads)
    assert torch.equal(to[:-1], expected[first : first + count])
    assert to[-1].isnan().all(), "nothing is written behind it"


@pytest.mark.parametrize("kind", [Int8WeightOnlyLinear, Int4Linear])
@pytest.mark.parametrize("n, k", [(10, 512), (96, 256)], ids=["kept", "widened in each call"])
def test_layers_call_it_again_and_again(kind: type, n: int, k: int):
    """Through a prepared call, which must notice that a weight was written."""
    if native.why_no_native():
        pytest.skip(str(native.why_no_native()))
    layer = kind.from_float(torch.nn.Linear(k, n), compute_dtype=torch.float32)
    op = layer.op_name
    with autotune.constraints(_tunable(op), implementation=NAME), torch.inference_mode():
        for shape in ((3, k), (2, 3, k), (1, k)):
            x = torch.randn(shape)
            expected = x @ layer.dequantize_weight().t() + layer.bias
            for _ in range(3):
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    with autotune.constraints(_tunable(op), implementation=NAME), torch.no_grad():
        x = torch.randn(4, k)
        for _ in range(3):
            layer(x)
        layer.weight_scale.mul_(2)
        torch.testing.assert_close(layer(x), x @ layer.dequantize_weight().t() + layer.bias, rtol=1e-4, atol=1e-4)


def _tunable(op: str) -> str:
    return tuning.implementation_of(op).name


def test_bfloat16_goes_to_the_library_where_it_is_multiplied_as_such(isa: str):
    assert panels.takes(torch.float32, torch.float32) and not panels.takes(torch.float64, None)
    assert panels.takes(torch.float32, torch.bfloat16) == (isa not in ("amx", "avx512_bf16"))


def test_panels_are_of_one_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 4 * 100 * 64)
    assert panels._channels(100, 64) == 100
    assert panels._channels(101, 64) == 51
    assert panels._channels(1, 10**6) == 1
