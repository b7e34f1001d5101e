"""The C kernels of int4 weights and of float activations, on every instruction set that this processor has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.problems import Case, float64, make, plain
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.cpu import linear, native
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import implementations, route
from tilewright.kernels.int4_int8_linear import cpu as int4_int8

DTYPES = tuple(native.DTYPES)
KERNELS = {
    op: next(one.function for one in implementations(op) if one.name == "C kernel")
    for op in ("int4_int8_linear", "int4_linear", "int8_weight_only_linear")
}
quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def unaligned(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values at other strides and addresses."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "sliced":
        wide = torch.full((x.shape[0], x.shape[1] + 3), math.nan, dtype=x.dtype)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    if how == "repeated rows":
        return x[:1].expand_as(x)
    return x


@quick
@given(
    op=st.sampled_from(tuple(KERNELS)),
    m=st.integers(1, 40),
    n=st.integers(1, 150),
    k=st.integers(1, 600),
    group_size=st.sampled_from((8, 32, 48, 128, 264, None)),
    dtype=st.sampled_from(DTYPES),
    compute_dtype=st.sampled_from((None, *DTYPES)),
    scale_dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(tuple(native.ACTIVATIONS)),
    flags=st.sets(st.sampled_from(("symmetric", "bias", "residual", "channel_scale"))),
    how=st.sampled_from(("plain", "transposed", "sliced", "repeated rows")),
    seed=st.integers(0, 1000),
)
def test_agrees_with_float64(
    isa: str,
    op: str,
    m: int,
    n: int,
    k: int,
    group_size: int | None,
    flags: set[str],
    how: str,
    seed: int,
    **options: Any,
):
    m, n = max(m, 4), max(n, 8)  # enough elements for an error to be compared with
    case = Case(op, m, n, k, group_size=group_size or k, **options, **{f: f in flags for f in ("symmetric", "bias")})
    case = case.with_(residual="residual" in flags, channel_scale="channel_scale" in flags)
    arguments = make(case, seed)
    arguments["x"] = unaligned(arguments["x"], how)
    reference = plain(case, arguments)
    assert_close_as_plain(KERNELS[op](**arguments), reference, float64(case, arguments))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k, group_size", [(1000, 128), (1000, 1000), (64, 8), (5000, 5000)])
def test_integer_sums_are_exact(isa: str, k: int, group_size: int, symmetric: bool):
    case = Case("int4_int8_linear", m=13, n=70, k=k, group_size=group_size, symmetric=symmetric, bias=False)
    arguments = make(case)
    arguments["weight_packed"].random_(-(2**31), 2**31 - 1)
    arguments["weight_packed"][:5] = -1  # 15 everywhere: the largest sums, which saturate 16 bits if anything does
    arguments["weight_scale"].fill_(1)
    x = torch.randint(-127, 128, (13, k)).float()
    x[:3] = 127  # the scale of each row is 1
    x[:, 0] = 127
    arguments["x"] = x
    w = int4_int8.int4.unpack_centred(arguments["weight_packed"], arguments["weight_zero"], group_size, k).double()
    sums = x.double() @ w.t()
    assert sums.abs().max() < 2**24  # float32 adds such groups without rounding
    assert torch.equal(KERNELS["int4_int8_linear"](**arguments).double(), sums)


@pytest.mark.parametrize("k, group_size", [(203, 40), (72, 8), (320, 32), (1100, 512), (700, 700)])
@pytest.mark.parametrize("m", [16, 17, 33, 47, 64, 79, 145])
def test_rows_in_tiles_are_those_multiplied_alone(isa: str, m: int, k: int, group_size: int):
    """Groups that end within a tile or need several, and the last rows of all counts: none reads or adds another's."""
    case = Case("int4_int8_linear", m=m, n=100, k=k, group_size=group_size, symmetric=False, residual=True)
    arguments = make(case)
    parts = zip(arguments["x"].split(5), arguments["residual"].split(5), strict=True)
    few = [KERNELS["int4_int8_linear"](**{**arguments, "x": x, "residual": residual}) for x, residual in parts]
    assert torch.equal(KERNELS["int4_int8_linear"](**arguments), torch.cat(few))


def default_decision(op: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    return make(Case(op, m=123, n=130, k=320, group_size=64, symmetric=False, dtype=dtype, **options))


VARIANTS = [
    pytest.param("int4_int8_linear", None, id="int4_int8"),
    *(
        pytest.param(op, compute, id=f"{op}-{str(compute).removeprefix('torch.')}")
        for op in ("int4_linear", "int8_weight_only_linear")
        for compute in (torch.float32, torch.bfloat16)
    ),
]


@pytest.mark.parametrize("op, compute_dtype", VARIANTS)
def test_result_depends_neither_on_the_batch_nor_on_threads(
    isa: str,
    op: str,
    compute_dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
):
    arguments = default_decision(op, compute_dtype=compute_dtype)
    whole, x = KERNELS[op](**arguments), arguments["x"]

    def in_parts(rows: int) -> torch.Tensor:
        return torch.cat([KERNELS[op](**{**arguments, "x": part}) for part in x.split(rows)])

    single = in_parts(1)
    assert torch.equal(single, in_parts(5))
    assert torch.equal(whole, in_parts(50))
    # Tiles of floats add up in another order than vectors do.
    assert torch.equal(whole, single) or (isa == "amx" and op != "int4_int8_linear")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(KERNELS[op](**arguments), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 7000)  # several blocks of rows
    assert torch.equal(KERNELS[op](**arguments), whole)


@pytest.mark.parametrize("op, compute_dtype", VARIANTS)
def test_a_bad_row_stays_alone(isa: str, op: str, compute_dtype: torch.dtype | None):
    arguments = default_decision(op, compute_dtype=compute_dtype)
    clean = KERNELS[op](**arguments)
    arguments["x"][3, 7], arguments["x"][20, 300] = math.nan, math.inf
    y = KERNELS[op](**arguments)
    good = [row for row in range(123) if row not in (3, 20)]
    assert torch.equal(y[good], clean[good])
    assert not y[[3, 20]].isfinite().any()


@pytest.mark.parametrize("op, compute_dtype", VARIANTS)
def test_replacing_a_scale_is_noticed(isa: str, op: str, compute_dtype: torch.dtype | None):
    arguments = default_decision(op, compute_dtype=compute_dtype) | {"bias": None}
    y = KERNELS[op](**arguments)
    arguments["weight_scale"].mul_(2)
    assert torch.allclose(KERNELS[op](**arguments), 2 * y, rtol=1e-6)


@pytest.mark.parametrize(
    "op, options, words",
    [
        ("int4_linear", {"group_size": 12}, "multiple of 8 columns, not of 12"),
        ("int4_int8_linear", {"group_size": 12}, "multiple of 8 columns, not of 12"),
        ("int4_linear", {"compute_dtype": torch.float64}, "does not multiply in torch.float64"),
        ("int8_weight_only_linear", {"activation": "mish"}, "does not have the activation mish"),
    ],
)
def test_declines_in_words(isa: str, op: str, options: dict[str, Any], words: str):
    problem = Problem(op, 4, 64, 64, torch.float32, **{"group_size": 32, **options})
    assert words in dict(route(problem).declined)["C kernel"]


# ---- tiles of AMX, from 7 rows on
@pytest.mark.parametrize("op", ["int4_linear", "int8_weight_only_linear"])
@pytest.mark.parametrize("compute_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 96, None])
def test_products_are_exact_at_the_edges_of_tiles(
    isa: str, op: str, compute_dtype: torch.dtype, group_size: int | None
):
    """Of x in as many bits as the format has: each of its parts must arrive, and at its own place."""
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[compute_dtype]
    for m, n, k in ((7, 1, 8), (8, 33, 31), (16, 64, 33), (17, 70, 512), (33, 31, 520), (49, 97, 1100), (271, 65, 600)):
        case = Case(op, m=m, n=n, k=k, group_size=group_size or k, symmetric=False, compute_dtype=compute_dtype)
        arguments = make(case.with_(bias=False))
        arguments["weight_scale"].fill_(1)
        # One number in each row of x, so that nothing is added up.
        column = torch.arange(m) * 7 % k
        value = torch.randint(-(2**bits) + 1, 2**bits, (m,)).float()
        arguments["x"] = torch.zeros(m, k).scatter_(1, column[:, None], value[:, None])
        if op == "int4_linear":
            zero = arguments["weight_zero"]
            weight = int4_int8.int4.unpack_centred(arguments["weight_packed"], zero, case.group_size, k)
        else:
            weight = arguments["weight"]
        exact = value.double()[:, None] * weight.double()[:, column].t()
        # A product of 24 bits and 8 is rounded once for each part of x.
        rtol = 2.0**-22 if compute_dtype == torch.float32 else 0
        torch.testing.assert_close(KERNELS[op](**arguments).double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("op", ["int4_linear", "int8_weight_only_linear"])
@pytest.mark.parametrize("m", [5, 9, 40])
def test_a_bad_row_stays_bad_and_alone(isa: str, op: str, m: int):
    arguments = make(Case(op, m=m, n=70, k=320, group_size=64, symmetric=False))
    clean = KERNELS[op](**arguments)
    x = arguments["x"]
    x[1, 319], x[3, 7], x[4, 100] = math.inf, math.nan, -math.inf
    x[3, 8] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # no NaN in its upper half
    y = KERNELS[op](**arguments)
    bad = [1, 3, 4]
    good = [row for row in range(m) if row not in bad]
    assert torch.equal(y[good], clean[good])
    assert not y[bad].isfinite().any()


@pytest.mark.parametrize("op", ["int4_linear", "int8_weight_only_linear"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 5, 9, 40, 200])
def test_a_channel_does_not_depend_on_how_many_there_are(isa: str, op: str, compute: torch.dtype, m: int):
    """A panel with few channels is multiplied by one vector of them."""
    case = Case(op, m=m, n=144, k=200, group_size=64, symmetric=False, bias=False, compute_dtype=compute)
    arguments = make(case)
    y = KERNELS[op](**arguments)
    weight = "weight" if op == "int8_weight_only_linear" else "weight_packed"
    for n in (1, 8, 10, 16, 17, 65, 74, 130):
        few = {**arguments, weight: arguments[weight][:n], "weight_scale": arguments["weight_scale"][:n]}
        if arguments.get("weight_zero") is not None:
            few["weight_zero"] = arguments["weight_zero"][: -(-n // 8)]
        assert torch.equal(KERNELS[op](**few), y[:, :n])
