"""The C kernels on every instruction set that this processor has: bit for bit the references' integers."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tolerance import assert_close_as_plain
from tilewright.kernels.activation import apply_activation
from tilewright.kernels.cpu import build, linear, native
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route
from tilewright.kernels.int8_linear import reference
from tilewright.kernels.quantize import reference as quantize_reference

DTYPES = tuple(native.DTYPES)
quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    channel_scale: torch.Tensor | None,
) -> torch.Tensor:
    return linear.prepare_int8(weight, weight_scale, bias, activation, channel_scale, x.shape[-1])(x, residual)


def int8_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    weight[:, : k // 2] = 127  # sums of pairs beyond 16 bits
    return weight, torch.rand(n) / 64 + 0.01


@quick
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    zero_point=st.sampled_from((0, 128)),
    seed=st.integers(0, 1000),
)
def test_quantised_rows_are_the_references(
    isa: str, m: int, k: int, dtype: torch.dtype, scaled: bool, zero_point: int, seed: int
):
    torch.manual_seed(seed)
    x = (torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]).to(dtype)
    x[0, 0] = 0.5 * x[0].abs().amax()  # ties
    channel_scale = torch.rand(k) + 0.5 if scaled else None
    q, scale = torch.empty(m, k, dtype=torch.uint8), torch.empty(m)
    assert native.quantize_rows(x, channel_scale, zero_point, q, scale)
    expected, expected_scale = quantize_reference.quantize_per_row(x, channel_scale)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q, (expected.to(torch.int32) + zero_point).to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_rows_quantise_as_the_reference(isa: str, dtype: torch.dtype):
    tiny = torch.finfo(torch.float32).smallest_normal / 2**20
    rows = [torch.randn(37) for _ in range(6)]
    rows[0][5], rows[1][36], rows[2][:] = math.nan, -math.inf, 0.0
    rows[3] *= tiny
    x = torch.stack(rows).to(dtype)
    q, scale = torch.empty(6, 37, dtype=torch.uint8), torch.empty(6)
    assert native.quantize_rows(x, None, 128, q, scale)
    expected, expected_scale = quantize_reference.quantize_per_row(x)
    assert torch.equal(scale.nan_to_num(-1.0, -2.0), expected_scale.nan_to_num(-1.0, -2.0))
    assert torch.equal(q.to(torch.int32) - 128, expected.to(torch.int32))


@quick
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 150),
    k=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(tuple(native.ACTIVATIONS)),
    extras=st.sets(st.sampled_from(("bias", "residual", "channel_scale", "strided"))),
    seed=st.integers(0, 1000),
)
def test_linear_agrees_with_float64(
    isa: str, m: int, n: int, k: int, dtype: torch.dtype, activation: str, extras: set[str], seed: int
):
    torch.manual_seed(seed)
    if activation not in ("none", "relu"):
        m = max(m, 64)  # at a single element the plain expression may happen to be exact
    weight, weight_scale = int8_weight(n, k)
    x = torch.randn(m, k, dtype=dtype)
    if "strided" in extras:
        x = torch.randn(k, m, dtype=dtype).t() if seed % 2 else torch.randn(m, 2 * k, dtype=dtype)[:, k:]
    bias = torch.randn(n).to(dtype) if "bias" in extras else None
    residual = torch.randn(m, n).to(dtype) if "residual" in extras else None
    channel_scale = torch.rand(k) + 0.5 if "channel_scale" in extras else None
    arguments = (weight, weight_scale, bias, residual, activation, channel_scale)
    actual = int8_linear(x, *arguments)
    plain = reference.int8_linear(x, *arguments)
    q, scale = quantize_reference.quantize_per_row(x, channel_scale)
    exact = q.double() @ weight.double().t() * scale.double()[:, None] * weight_scale.double()
    exact = apply_activation(exact + (0 if bias is None else bias.double()), activation)
    assert_close_as_plain(actual, plain, exact + (0 if residual is None else residual.double()))


def test_integer_sums_are_exact(isa: str):
    m, n, k = 13, 70, 1001
    weight, _ = int8_weight(n, k)
    x = torch.randint(-127, 128, (m, k)).float()
    x[:, 0] = 127  # so that the scale is 1 and the rows are already what they are quantised to
    y = int8_linear(x, weight, torch.ones(n), None, None, "none", None)
    assert torch.equal(y.double(), (x.double() @ weight.double().t()).float().double())


@pytest.mark.parametrize("m", [5, 6, 7, 16, 17, 33, 63, 64, 65, 129, 200])
@pytest.mark.parametrize("n, k", [(1, 63), (33, 64), (64, 65), (70, 577), (300, 128), (1600, 600)])
def test_integer_sums_are_exact_at_the_edges_of_tiles(isa: str, m: int, n: int, k: int):
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    x = torch.randint(-127, 128, (m, k)).float()
    x[:, 0] = 127
    bias, residual = torch.randint(-9, 10, (n,)).float(), torch.randint(-9, 10, (m, n)).float()
    y = int8_linear(x, weight, torch.ones(n), bias, residual, "relu", None)
    exact = (x.double() @ weight.double().t() + bias).clamp_min(0) + residual
    assert exact.abs().max() < 2**24
    assert torch.equal(y.double(), exact)


def test_others_may_use_tiles_in_between(isa: str):
    """oneDNN shapes the tiles of a thread for its own products of bfloat16; Python's threads share PyTorch's."""
    weight, weight_scale = int8_weight(96, 200)
    x, low = torch.randn(150, 200), torch.randn(128, 128, dtype=torch.bfloat16)
    arguments = (weight, weight_scale, None, None, "none", None)
    expected, product = int8_linear(x, *arguments), low @ low
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(low @ low, product):
                wrong.append("bfloat16")
            if not torch.equal(int8_linear(x, *arguments), expected):
                wrong.append("int8")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bad_row_stays_alone(isa: str):
    weight, weight_scale = int8_weight(70, 64)
    x = torch.randn(9, 64)
    clean = int8_linear(x, weight, weight_scale, None, None, "gelu", None)
    x[3, 7], x[5, 0] = math.nan, math.inf
    y = int8_linear(x, weight, weight_scale, None, None, "gelu", None)
    good = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(y[good], clean[good])
    assert y[[3, 5]].isnan().all()


def test_result_depends_neither_on_the_batch_nor_on_threads(isa: str):
    weight, weight_scale = int8_weight(200, 160)
    x = torch.randn(123, 160)
    whole = int8_linear(x, weight, weight_scale, None, None, "silu", None)
    few = torch.cat([int8_linear(part, weight, weight_scale, None, None, "silu", None) for part in x.split(7)])
    assert torch.equal(whole, few)
    alone = torch.cat([int8_linear(row[None], weight, weight_scale, None, None, "silu", None) for row in x])
    assert torch.equal(whole, alone)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(int8_linear(x, weight, weight_scale, None, None, "silu", None), whole)
    finally:
        torch.set_num_threads(threads)


def test_rows_in_several_blocks(isa: str, monkeypatch: pytest.MonkeyPatch):
    weight, weight_scale = int8_weight(70, 100)
    x = torch.randn(50, 100)
    whole = int8_linear(x, weight, weight_scale, None, None, "none", None)
    monkeypatch.setattr(linear, "_BLOCK_BYTES", 700)
    assert torch.equal(int8_linear(x, weight, weight_scale, None, None, "none", None), whole)


@pytest.mark.parametrize("m", [100, 289])
def test_however_the_threads_share_the_work(isa: str, m: int, monkeypatch: pytest.MonkeyPatch):
    weight, weight_scale = int8_weight(70, 100)
    x, residual = torch.randn(m, 100), torch.randn(m, 70)
    x[m - 1, 3] = math.nan

    def run() -> torch.Tensor:
        return int8_linear(x, weight, weight_scale, None, residual, "gelu", None).nan_to_num(-1.0)

    by_rows = run()
    monkeypatch.setattr(linear, "_CACHED_WEIGHT", 0)
    assert torch.equal(run(), by_rows)
    monkeypatch.setattr(linear, "_OWN_ELEMENTS", 1 << 20)
    assert torch.equal(run(), by_rows)


def test_several_python_threads_at_once(isa: str):
    weight, weight_scale = int8_weight(200, 256)
    inputs = [torch.randn(64, 256) for _ in range(4)]
    expected = [int8_linear(x, weight, weight_scale, None, None, "none", None) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(int8_linear(inputs[i], weight, weight_scale, None, None, "none", None), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_other_python_threads_run_while_a_kernel_does(isa: str):
    weight, weight_scale = int8_weight(1024, 1024)
    x = torch.randn(512 if isa != "portable" else 64, 1024)
    steps, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            steps[0] += 1

    int8_linear(x, weight, weight_scale, None, None, "none", None)
    counter = threading.Thread(target=count)
    counter.start()
    try:
        moved = 0
        for _ in range(20):
            before = steps[0]
            int8_linear(x, weight, weight_scale, None, None, "none", None)
            moved += steps[0] > before
    finally:
        stop.set()
        counter.join()
    assert moved


def test_threads_are_pytorchs_own():
    if native.why_no_native() is not None:
        pytest.skip(str(native.why_no_native()))
    script = """
import os, torch
torch.set_num_threads(3)
torch.randn(1 << 20).exp_()
runtimes = lambda: {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1]}
before = len(os.listdir("/proc/self/task")), runtimes()
from tilewright.kernels.cpu import linear, native
call = linear.prepare_int8(torch.ones(512, 512, dtype=torch.int8), torch.ones(512), None, "none", None, 512)
for _ in range(3):
    call(torch.randn(256, 512))
assert native.why_no_native() is None
assert before == (len(os.listdir("/proc/self/task")), runtimes()), "other threads, or another OpenMP runtime"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_writing_into_the_weight_is_noticed(isa: str):
    weight, weight_scale = int8_weight(20, 32)
    x = torch.randn(3, 32)
    int8_linear(x, weight, weight_scale, None, None, "none", None)
    weight.zero_()
    assert not int8_linear(x, weight, weight_scale, None, None, "none", None).any()


@pytest.mark.parametrize(
    "m, x_dtype, activation, words",
    [
        (0, torch.float32, "none", "nothing to multiply"),
        (4, torch.float64, "none", "does not read torch.float64"),
    ],
)
def test_declines_in_words(isa: str, m: int, x_dtype: torch.dtype, activation: str, words: str):
    problem = Problem("int8_linear", m, 64, 64, x_dtype, activation=activation, device="cpu")
    declined = dict(route(problem).declined)
    assert words in declined["C kernel"]


def test_can_be_turned_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TILEWRIGHT_CPU_ISA", "off")
    native.reload()
    try:
        assert "turned off" in (native.why_no_native() or "")
        assert not native.quantize_rows(torch.randn(2, 4), None, 0, torch.empty(2, 4), torch.empty(2))
    finally:
        native.reload()


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TILEWRIGHT_CPU_ISA", "mmx")
    native.reload()
    with pytest.raises(ValueError, match=r"mmx is unknown; the known ones are amx, avx512_bf16"):
        native.why_no_native()
    native.reload()


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch):
    if native.why_no_native() is not None:
        pytest.skip(str(native.why_no_native()))
    monkeypatch.setattr(build, "source_hash", lambda: "0" * 16)
    native.reload()
    try:
        assert "compiled from other sources" in (native.why_no_native() or "")
    finally:
        monkeypatch.undo()
        native.reload()


def test_what_an_old_compiler_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path):
    if build.isas() == ["portable"]:
        pytest.skip("needs an x86 processor: elsewhere there is one build")
    old = tmp_path / "old-cc"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {build.find_compiler()} "$@"\n')
    old.chmod(0o755)
    assert build.known_isas(str(old)) == [name for name in build.isas() if name != "amx"]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildError, match="there is no C compiler"):
        build.build(tmp_path / "_native.so")


@quick
@given(
    count=st.sampled_from((1, 3, 255, 256, 1000, 70_000)),
    size=st.sampled_from((1e-30, 0.3, 1.0, 7e4)),
    rectified=st.booleans(),
    room=st.sampled_from((1.0, 1.3, 2.0)),
    seed=st.integers(0, 1000),
)
def test_a_histogram_is_that_of_pytorch(isa: str, count: int, size: float, rectified: bool, room: float, seed: int):
    torch.manual_seed(seed)
    x = torch.randn(count) * size
    x = x.relu() if rectified else x
    limit = room * max(float(x.abs().max()), 1e-30)
    expected = torch.histc(x, 512, -limit, limit)
    threads = torch.get_num_threads()
    try:
        for each in (1, 2, 3):
            torch.set_num_threads(each)
            found = native.histogram(x, 512, limit)
            assert found is not None and torch.equal(found, expected.long())
    finally:
        torch.set_num_threads(threads)


def test_a_histogram_that_c_does_not_make(isa: str):
    assert native.histogram(torch.zeros(4, dtype=torch.float64), 8, 1.0) is None
    assert native.histogram(torch.zeros(4, 4).t()[:, :2], 8, 1.0) is None
