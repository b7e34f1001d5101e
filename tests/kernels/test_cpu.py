"""Rung 2: every implementation that runs on a CPU against the references and float64 mathematics."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.problems import COMPUTE_OPS, LINEAR_OPS, SPARSE_OPS, Case, float64, make, plain
from tests.tolerance import assert_close_as_plain
from tilewright.kernels.cpu import probes
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.int4_linear import cpu as int4_cpu
from tilewright.kernels.quantize import reference as quantize_reference
from tilewright.kernels.quantize.cpu import quantize_per_row
from tilewright.nn import Int4Linear, Int8Linear, QuantizedLinear

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS = (1, 3, 17, 40, 41, 70, 300)
COLUMNS = (1, 2, 31, 33, 100, 257, 1000)
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def problem(case: Case) -> Problem:
    facts: dict[str, Any] = {}
    if case.is_int4:
        facts = {"group_size": case.group_size, "symmetric": case.symmetric, "scale_dtype": case.scale_dtype}
    x_dtype = torch.int8 if case.op == "int8_linear_quantized" else case.dtype
    return Problem(case.op, case.m, case.n, case.k, x_dtype, compute_dtype=case.compute_dtype, **facts)


def fast(op: str) -> list[router.Implementation]:
    """The implementations made for a CPU."""
    return [one for one in router.implementations(op) if one.target.split(":")[0].endswith((".cpu", ".dense"))]


def willing(op: str) -> Iterator[Any]:
    for one in fast(op):
        yield pytest.param(op, one.name, id=f"{op}-{one.name.replace(' ', '_')}")


EACH = [parameter for op in LINEAR_OPS for parameter in willing(op)]


def implementation(op: str, name: str) -> router.Implementation:
    return next(one for one in router.implementations(op) if one.name == name)


def default_decision(op: str, name: str, **changes: Any) -> Case:
    """A case that the implementation takes; skips, with its reason, where this machine lacks what it needs."""
    case = Case(op).with_(**{"m": 4, "n": 48, "k": 96, **changes})
    if "ATen" in name:
        case = case.with_(compute_dtype=torch.bfloat16)
    reason = implementation(op, name).why_not(problem(case))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return case


def check(case: Case, name: str, seed: int = 0) -> None:
    arguments = make(case, seed)
    y = implementation(case.op, name).function(**arguments)
    if case.dtype == torch.float64 and case.multiplies_floats:
        # Here float64 cannot play the exact result: both sides round alike.
        assert torch.allclose(y, float64(case, arguments), rtol=1e-12, atol=1e-13)
        return
    assert_close_as_plain(y, plain(case, arguments), float64(case, arguments))


def accepted(cases: list[Case]) -> list[Any]:
    """Every case with every implementation that takes it on this machine."""
    return [
        pytest.param(case, one.name, id=f"{one.name.replace(' ', '_')}-{case}")
        for case in cases
        for one in fast(case.op)
        if one.why_not(problem(case)) is None
    ]


# ---- right on every shape
def shapes(op: str) -> list[Case]:
    """Every M with every K once, N ragged and growing where M is small: 32 outputs at least."""
    base = Case(op, compute_dtype=torch.bfloat16 if op in COMPUTE_OPS else None)
    found = []
    for i, (m, k) in enumerate(itertools.product(ROWS, COLUMNS)):
        n = (33, 48, 65, 130)[i % 4]
        found.append(base.with_(m=m, n=n, k=k, symmetric=i % 3 > 0, bias=i % 5 > 0, residual=i % 2 > 0))
    return found


@pytest.mark.parametrize("case, name", accepted([case for op in LINEAR_OPS for case in shapes(op)]))
def test_shapes(case: Case, name: str) -> None:
    check(case, name)


OPTIONS = [
    Case(
        op, m=m, n=48, k=k, dtype=dtype, compute_dtype=compute, activation=activation, residual=True, channel_scale=True
    )
    for op in LINEAR_OPS
    for m, k in ((4, 96), (70, 200))
    for dtype, compute, activation in (
        (torch.float16, None, "gelu"),
        (torch.bfloat16, None, "silu"),
        (torch.float32, None, "relu"),
        (torch.float64, None, "none"),
        (torch.float32, torch.bfloat16, "gelu_tanh"),
        (torch.float16, torch.bfloat16, "none"),
        (torch.bfloat16, torch.float32, "none"),
        (torch.float32, torch.float16, "none"),
    )
    if compute is None or op in COMPUTE_OPS
]


@pytest.mark.parametrize("case, name", accepted(OPTIONS))
def test_dtypes_and_epilogues(case: Case, name: str) -> None:
    check(case, name)


GROUPS = [
    Case(op, m=m, n=50, k=k, compute_dtype=compute, group_size=group, symmetric=symmetric, scale_dtype=scale_dtype)
    for op, compute in (("int4_linear", torch.bfloat16), ("int4_linear", None), ("int4_int8_linear", None))
    for m, k in ((5, 256), (50, 300))
    for group, scale_dtype in (
        (32, torch.bfloat16),
        (64, torch.float16),
        (128, torch.float32),
        (-1, torch.bfloat16),
        (40, torch.float32),
        (7, torch.float32),
    )
    for symmetric in (True, False)
]


#: What PyTorch itself multiplies.
BY_LIBRARY = ("sparse24_linear", "unpacked once, then dense")


def with_whole_rows(case: Case) -> Case:
    return case.with_(group_size=case.k) if case.group_size == -1 else case


@pytest.mark.parametrize("case, name", accepted([with_whole_rows(case) for case in GROUPS]))
def test_groups_and_zero_points(case: Case, name: str) -> None:
    check(case, name)


@pytest.mark.parametrize("op, name", EACH)
def test_leading_dimensions_and_strides(op: str, name: str) -> None:
    """Transposed, sliced, expanded and reshaped inputs give what their contiguous copies give."""
    case = default_decision(op, name, m=24, residual=True)
    arguments, function = make(case), implementation(op, name).function
    flat = function(**arguments)
    inputs = {key: arguments[key] for key in ("x", "residual", "x_scale") if key in arguments}

    def call(change: Any) -> torch.Tensor:
        return function(**arguments | {key: change(value) for key, value in inputs.items()})

    def strided(value: torch.Tensor) -> torch.Tensor:
        """Every other element of twice as many, with what lies between poisoned."""
        wide = torch.full((*value.shape, 2), 100 if value.dtype == torch.int8 else torch.nan).to(value.dtype)
        wide[..., 0] = value
        return wide[..., 0]

    assert torch.equal(call(lambda t: t.reshape(2, 3, 4, *t.shape[1:])), flat.view(2, 3, 4, -1))
    assert torch.equal(call(lambda t: t.t().contiguous().t()), flat)
    assert torch.equal(call(strided), flat)
    # A library's sums may depend on where in the batch a row stands: MKL's do on processors with AMX.
    moved = {"rtol": 1e-5, "atol": 1e-5} if (op, name) == BY_LIBRARY else {"rtol": 0, "atol": 0}
    middle = call(lambda t: t.reshape(4, 6, *t.shape[1:]).transpose(0, 1))
    torch.testing.assert_close(middle, flat.view(4, 6, -1).transpose(0, 1), **moved)
    repeated = call(lambda t: t[:1].expand(24, *t.shape[1:]))
    torch.testing.assert_close(repeated, repeated[:1].expand_as(repeated), **moved)
    single = {key: value[5] for key, value in inputs.items()}
    assert function(**arguments | single).shape == (case.n,)
    assert_close_as_plain(function(**arguments | single), plain(case, arguments)[5], float64(case, arguments)[5])


@pytest.mark.parametrize("op, name", [each for each in EACH if each.values[0] not in ("int4_linear", *SPARSE_OPS)])
def test_a_weight_is_not_taken_for_its_transpose(op: str, name: str) -> None:
    """Both have one address and, if square, one shape."""
    case = default_decision(op, name, n=96, bias=False)
    arguments, function = make(case), implementation(op, name).function
    key = "weight_packed" if case.is_int4 else "weight"
    if case.is_int4:
        arguments |= {"x": torch.randn(4, 768), "weight_packed": torch.randint(2**31, (96, 96), dtype=torch.int32)}
        arguments["weight_scale"] = torch.rand(96, 768 // 32)
    function(**arguments)
    turned = arguments | {key: arguments[key].t()}
    assert torch.equal(function(**turned), function(**turned | {key: turned[key].contiguous()}))


@pytest.mark.parametrize("op, name", EACH)
def test_arguments_are_left_alone(op: str, name: str) -> None:
    case = default_decision(op, name, residual=True)
    arguments = make(case)
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    y = implementation(op, name).function(**arguments)
    for key, value in before.items():
        assert torch.equal(arguments[key], value), key
    kept = y.clone()
    implementation(op, name).function(**make(case, seed=1))
    assert torch.equal(y, kept), "the output lives in memory that the next call writes over"


# ---- rows do not touch one another
@pytest.mark.parametrize("op, name", EACH)
def test_a_row_does_not_depend_on_its_batch(op: str, name: str) -> None:
    """Within one implementation: which one serves may change with the batch."""
    for case in (default_decision(op, name, m=m, k=k) for m, k in ((24, 96), (24, 1024))):
        arguments, function = make(case), implementation(op, name).function
        whole = function(**arguments)
        for rows in (slice(0, 8), slice(5, 24)):
            part = {key: arguments[key][rows] for key in ("x", "x_scale") if key in arguments}
            assert_close_as_plain(
                function(**arguments | part), plain(case, arguments)[rows], float64(case, arguments)[rows]
            )
            if not case.multiplies_floats:
                assert torch.equal(function(**arguments | part), whole[rows])


@pytest.mark.parametrize("op, name", EACH)
def test_runs_repeat_to_the_bit(op: str, name: str) -> None:
    arguments, function = make(default_decision(op, name, m=30, k=1024)), implementation(op, name).function
    first = function(**arguments)
    for _ in range(5):
        assert torch.equal(function(**arguments), first)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("op, name", EACH)
def test_a_row_without_a_number_stays_without_one_and_alone(op: str, name: str, bad: str) -> None:
    case = default_decision(op, name)
    arguments, function = make(case), implementation(op, name).function
    clean = function(**arguments)
    key = "x_scale" if op == "int8_linear_quantized" else "x"
    arguments[key] = arguments[key].clone()
    arguments[key].view(case.m, -1)[2, 0] = BAD[bad]
    y = function(**arguments)
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    assert not y[2].isfinite().any()


@pytest.mark.parametrize("op, name", EACH)
def test_a_huge_row_and_a_zero_row_change_no_other(op: str, name: str) -> None:
    case = default_decision(op, name)
    arguments, function = make(case), implementation(op, name).function
    clean = function(**arguments)
    key = "x_scale" if op == "int8_linear_quantized" else "x"
    arguments[key], arguments["x"] = arguments[key].clone(), arguments["x"].clone()
    arguments[key][1] *= 1e30
    arguments["x"][2] = 0
    y = function(**arguments)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert torch.equal(y[2], arguments["bias"])
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("columns", [200, 4100])
def test_int4_blocks_with_huge_scales_stay_finite(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pads a block of the dequantised weight is zero in every block, not what the last one left there."""
    monkeypatch.setattr(int4_cpu, "WEIGHT_BLOCK_ELEMENTS", 256)
    case = Case("int4_linear", m=50, n=64, k=columns, group_size=128, symmetric=False)
    arguments = make(case)
    arguments["weight_scale"] = arguments["weight_scale"] * 1e8
    y, expected = int4_cpu.dequantized_blocks(**arguments), float64(case, arguments)
    # Blocks of one row go through another sum than the plain product: the bar proper is that of the tests above.
    assert (y - expected).norm() < 1e-6 * expected.norm()


# ---- integers to the bit
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 9),
    k=st.sampled_from([0, 1, 2, 31, 33, 257]),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from([0.0, 1e-44, 1e-42, 1e-40, 1e-37, 1e-7, 1.0, 3e4]),
    smooth=st.booleans(),
    bad=st.sampled_from([None, *BAD.values()]),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "3d", "1d"]),
    seed=st.integers(0, 2**31),
)
def test_quantize_per_row_is_the_reference_to_the_bit(
    m: int, k: int, dtype: torch.dtype, magnitude: float, smooth: bool, bad: float | None, layout: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=g, dtype=torch.float64) * magnitude).to(dtype)
    if bad is not None and x.numel():
        x[m // 2, k // 2] = bad
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "expanded" and m:
        x = x[:1].expand(m, k)
    elif layout == "3d":
        x = x.expand(2, m, k).transpose(0, 1)
    elif layout == "1d" and m:
        x = x[0]
    channel_scale = torch.rand(k, generator=g) + 0.5 if smooth else None
    q, scale = quantize_per_row(x, channel_scale)
    q_expected, scale_expected = quantize_reference.quantize_per_row(x, channel_scale)
    assert torch.equal(q, q_expected)
    assert q.dtype == torch.int8
    assert torch.equal(scale.view(torch.int32), scale_expected.view(torch.int32)) or (
        torch.equal(scale.nan_to_num(-1), scale_expected.nan_to_num(-1))
    )


def test_quantize_per_row_in_blocks_is_the_reference_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a block: one block with a row that needs the slow path, the others without."""
    monkeypatch.setattr("tilewright.kernels.quantize.cpu.BLOCK_ELEMENTS", 64 * 8)
    x = torch.randn(50, 64)
    x[20], x[21, 1], x[22] = 1e-44, torch.nan, 0
    q, scale = quantize_per_row(x)
    q_expected, scale_expected = quantize_reference.quantize_per_row(x)
    assert torch.equal(q, q_expected)
    assert torch.equal(scale.nan_to_num(-1), scale_expected.nan_to_num(-1))


def test_ties_are_quantised_to_the_even_integer() -> None:
    halves = torch.arange(-126.5, 127)
    x = torch.cat([halves, torch.tensor([127.0])]).expand(3, -1)
    assert torch.equal(quantize_per_row(x)[0], quantize_reference.quantize_per_row(x)[0])


@pytest.mark.parametrize("name", [one.name for one in fast("int8_linear_quantized")])
@pytest.mark.parametrize("k", [512, 4096, 60_000])
def test_int8_sums_are_exact_at_the_extremes(name: str, k: int) -> None:
    """Sums of the largest products, which 16-bit pairs (CPUs without VNNI) or float32 accumulators would get wrong."""
    q = torch.full((2, k), 127, dtype=torch.int8)
    q[1, ::2] = -127
    q[1, 0] = 126
    weight = torch.full((32, k), 127, dtype=torch.int8)
    weight[1::2] = -127
    weight[2, 1] = 126
    ones = torch.ones(2), torch.ones(32)
    case = Case("int8_linear_quantized", 2, 32, k)
    if reason := implementation(case.op, name).why_not(problem(case)):
        pytest.skip(f"{name}: {reason}")
    end = {"bias": None, "residual": None, "activation": "none", "out_dtype": None}
    y = implementation(case.op, name).function(x=q, x_scale=ones[0], weight=weight, weight_scale=ones[1], **end)
    exact = q.long() @ weight.long().t()
    # The one rounding is that of an integer to float32.
    assert torch.equal(y, exact.float())


@pytest.mark.parametrize("m", [1, 16, 128, 512])
@pytest.mark.parametrize("layer, error", [(Int8Linear, 0.02), (Int4Linear, 0.15)], ids=["int8", "int4"])
def test_large_layers_are_right(layer: type[QuantizedLinear], error: float, m: int) -> None:
    linear, x = torch.nn.Linear(4096, 4096), torch.randn(m, 4096)
    with torch.inference_mode():
        expected = linear(x)
        assert (layer.from_float(linear)(x) - expected).norm() < error * expected.norm()


# ---- threads and modes
@pytest.mark.parametrize("op, name", EACH)
def test_threads_do_not_share_scratch_memory(op: str, name: str) -> None:
    calls = [make(default_decision(op, name, m=m), seed=m) for m in (2, 5, 11, 30)]
    function = implementation(op, name).function
    expected = [function(**arguments) for arguments in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for y, right in zip(pool.map(lambda arguments: function(**arguments), calls), expected, strict=True):
                assert torch.equal(y, right)


@pytest.mark.parametrize("op, name", EACH)
def test_inference_mode_and_normal_mode_take_turns(op: str, name: str) -> None:
    arguments, function = make(default_decision(op, name)), implementation(op, name).function
    with torch.inference_mode():
        first = function(**arguments)
    second = function(**arguments)
    second.add_(0)  # would raise if scratch memory had made it an inference tensor
    with torch.inference_mode():
        third = function(**arguments)
    assert torch.equal(first, second) and torch.equal(second, third)


@pytest.mark.parametrize("probe", ["why_no_qlinear", "why_no_int8pack", "why_no_int4pack"])
def test_a_probe_answers_with_a_reason_or_none(probe: str) -> None:
    answer = getattr(probes, probe)()
    assert answer is None or (isinstance(answer, str) and answer)


def test_a_wrong_private_operator_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.zeros(len(x), 512, dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", wrong)
    assert "wrong results" in str(probes.why_no_int8pack.__wrapped__())
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    assert "not usable" in str(probes.why_no_int8pack.__wrapped__())


SWEEP = """
    import itertools
    import torch
    from tests.kernels.problems import COMPUTE_OPS, Case, make
    from tests.kernels.test_cpu import LINEAR_OPS, fast, problem

    torch.set_num_threads(1)
    count = 0
    rows, outputs, columns = (1, 2, 5, 33), (1, 2, 15, 17, 32, 63), (1, 3, 15, 16, 17, 48, 80, 129)
    for op, m, n, k in itertools.product(LINEAR_OPS, rows, outputs, columns):
        for group, symmetric in ((32, True), (16, False), (128, False)) if op.startswith("int4") else ((32, True),):
            case = Case(op, m, n, k, group_size=group, symmetric=symmetric,
                        compute_dtype=torch.bfloat16 if op in COMPUTE_OPS else None)
            for one in fast(op):
                if one.why_not(problem(case)) is None:
                    print(one.name, case, flush=True)
                    assert torch.isfinite(one.function(**make(case))).all()
                    count += 1
    print("calls:", count)
"""


def test_no_shape_crashes_the_process() -> None:
    """In a process of its own: PyTorch's private operators crash on shapes they do not like instead of raising."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SWEEP)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode} at {done.stdout[-200:]}\n{done.stderr[-2000:]}"
    assert int(done.stdout.split()[-1]) > 1000
