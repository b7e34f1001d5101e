"""How kernels join autotune: their spaces, what a choice depends on, CPU implementations that are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerance import assert_close_as_plain
from tilewright import autotune
from tilewright.autotune import tables
from tilewright.autotune.buckets import EDGES, upper_edge
from tilewright.kernels import tuning
from tilewright.kernels.conv_geometry import ConvGeometry
from tilewright.kernels.dispatch import router
from tilewright.kernels.dispatch.card import Card, cards, make_arguments
from tilewright.kernels.dispatch.problem import Problem, rows_aligned
from tilewright.kernels.dispatch.router import Implementation, implementations, invalidate, register, route, unregister
from tilewright.kernels.quantize.reference import quantize_per_row
from tilewright.nn import Sparse24Int4Linear, Sparse24Int8Linear, Sparse24Linear

H200: dict[str, Any] = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132, "device_name": "NVIDIA H200"}
A10: dict[str, Any] = {"device": "cuda", "capability": (8, 6), "multiprocessors": 72, "device_name": "NVIDIA A10"}
MI300: dict[str, Any] = {"device": "cuda", "gpu_arch": "gfx942", "multiprocessors": 304, "device_name": "MI300X"}
OPS = (
    "quantize_per_row",
    "layer_norm_quantize",
    "int8_linear",
    "int8_weight_only_linear",
    "int4_linear",
    "int4_int8_linear",
)
BATCHES = (1, 16, 33, 128, 256, 4096)


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle_machine: None):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path))
    autotune.forget_tables()
    yield
    autotune.forget_tables()


def problem(op: str, m: int = 16, facts: dict[str, Any] = H200, **more: Any) -> Problem:
    group = {"group_size": 128} if op.startswith("int4") else {}
    n = 4096 if "linear" in op else 0
    return Problem(op, m, n, 4096, torch.bfloat16, **{**facts, **group, **more})


def test_buckets():
    assert [upper_edge(m) for m in (1, 2, 3, 16, 17, 64, 65, 8192)] == [1, 2, 4, 16, 32, 64, 128, 8192]
    assert upper_edge(8193) == upper_edge(10**6) == 16384
    assert list(EDGES) == sorted(set(EDGES))


triton_is_here = pytest.mark.skipif(
    not list(tuning.kernels_for(problem("int4_linear"))),
    reason="Triton is not installed: it publishes wheels for Linux alone",
)


@triton_is_here
@pytest.mark.parametrize("facts", [H200, A10, MI300], ids=["H200", "A10", "MI300X"])
@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("op", OPS)
def test_every_space_has_the_heuristic_first_and_fits_the_device(op: str, m: int, facts: dict[str, Any]):
    kernels = list(tuning.kernels_for(problem(op, m, facts)))
    assert kernels or (op == "int8_weight_only_linear" and m > 256)
    for tuned, asked in kernels:
        serving, refused = tuned.split_candidates(asked)
        assert serving[0] == tuned.heuristic(asked) == tuned.choose(asked)
        assert len(serving) >= 3 and len(set(serving)) == len(serving) <= 200
        assert all(isinstance(reason, str) and reason for reason in refused.values())
        if facts is MI300:
            assert all(getattr(config, "num_stages", 2) <= 2 for config in serving)
        encoded = [tuned.encode(config) for config in serving]
        assert all(isinstance(value, (int, str, bool)) for fields in encoded for value in fields.values())


@triton_is_here
def test_shared_memory_is_estimated_and_the_reason_says_so():
    tuned, asked = list(tuning.kernels_for(problem("int8_linear_quantized", 256, A10)))[-1]
    _, refused = tuned.split_candidates(asked)
    assert any("shared memory, a block has 101376" in reason for reason in refused.values())


@triton_is_here
def test_the_launcher_and_the_tuner_ask_the_same_question(monkeypatch: pytest.MonkeyPatch):
    """A choice that is stored under other facts than the launcher looks up would never be used."""
    from tilewright.aot.launch import recorded

    convolutions = [conv_problem(kind, dtype) for kind in RESNET for dtype in (torch.bfloat16, torch.int8)]
    for whole in (*(problem(op, 16) for op in OPS), *convolutions):
        for tuned, asked in tuning.kernels_for(whole):
            seen: list[Problem] = []

            def choose(self: Any, found: Problem, tuned: Any = tuned, seen: list[Problem] = seen) -> Any:
                if self is tuned:
                    seen.append(found)
                return self.heuristic(found)

            with monkeypatch.context() as patch, recorded() as launches:
                patch.setattr(autotune.Tunable, "choose", choose)
                module = __import__(tuned.modules[0], fromlist=["x"])
                getattr(module, asked.op)(**make_arguments(asked, "meta"))
            assert launches and [tuning.facts_of(found) for found in seen[-1:]] == [tuning.facts_of(asked)]


RESNET = {
    "pointwise": ConvGeometry(8, 256, 14, 14, 64, (1, 1)),
    "implicit": ConvGeometry(8, 64, 14, 14, 64, (3, 3), padding=(1, 1, 1, 1)),
    "stem": ConvGeometry(2, 3, 64, 64, 32, (3, 3), (2, 2), (1, 1, 1, 1)),
    "depthwise": ConvGeometry(8, 96, 14, 14, 96, (3, 3), padding=(1, 1, 1, 1), groups=96),
}


def conv_problem(kind: str, dtype: torch.dtype, facts: dict[str, Any] = H200) -> Problem:
    sizes = RESNET[kind]
    op = "conv2d_fused" if dtype.is_floating_point else "int8_conv2d_fused"
    m, k = sizes.batch * sizes.out_height * sizes.out_width, sizes.taps * sizes.group_channels
    return Problem(op, m, sizes.out_channels, k, dtype, bias=True, conv=sizes, **facts)


@triton_is_here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("kind", RESNET)
def test_spaces_of_convolutions(kind: str, dtype: torch.dtype):
    asked = conv_problem(kind, dtype)
    found = {tuned.name: (tuned, derived) for tuned, derived in tuning.kernels_for(asked)}
    tuned, derived = found[f"conv2d.triton_{kind}"]
    serving, _ = tuned.split_candidates(derived)
    assert serving[0] == tuned.choose(derived) and 4 <= len(serving) <= 200
    for config in (serving[0], serving[-1]):
        launches = tuned.hooks.launches(tuned, derived, config, "cuda")
        assert launches and launches[0].num_warps == tuned.encode(config).get("tile.num_warps", launches[0].num_warps)


@pytest.mark.parametrize("kind", RESNET)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_timing_decides_between_cpu_convolutions(kind: str, dtype: torch.dtype):
    asked = replace(conv_problem(kind, dtype, {}), residual=True, activation="relu")
    outcome = autotune.tune(tuning.implementation_of(asked.op), asked, budget=2)
    assert not outcome.failed and outcome.config is not None
    assert route(asked).name == outcome.config


def test_alignment_and_dtypes_are_part_of_the_key():
    base = problem("int4_linear")
    others = [
        replace(base, aligned=False),
        replace(base, x_dtype=torch.float16),
        replace(base, compute_dtype=torch.float16),
        replace(base, group_size=64),
        replace(base, symmetric=False),
        replace(base, n=4097),
        replace(base, k=8192),
        base.with_rows(17),
    ]
    found = [str(tuning.facts_of(one)) for one in (base, *others)]
    assert len(set(found)) == len(found)
    assert tuning.facts_of(base.with_rows(9)) == tuning.facts_of(base)
    assert tuning.facts_of(replace(base, compute_dtype=torch.bfloat16)) == tuning.facts_of(base)


def test_rows_that_begin_at_odd_places():
    x = torch.zeros(4, 65, dtype=torch.bfloat16)
    assert rows_aligned(torch.zeros(4, 64, dtype=torch.bfloat16))
    assert not rows_aligned(x) and not rows_aligned(x[:, 1:])
    arguments = make_arguments(problem("int4_linear", aligned=False))
    assert not rows_aligned(arguments["x"]) and arguments["x"].shape == (16, 4096)


@pytest.mark.parametrize("device", [H200, MI300, {}], ids=["H200", "MI300X", "CPU"])
def test_device_kinds(device: dict[str, Any]):
    kind = tuning.device_kind(problem("int4_linear", facts=device))
    assert kind.name and bool(kind.units) == bool(device) and kind.is_cpu == (not device)
    assert kind.arch == {"cuda": "sm_90"}.get(str(device.get("device")), kind.arch) or kind.arch == "gfx942"


# ---- CPU implementations
LINEAR = [card.name for card in cards() if card.weight_of is not None and "x_scale" not in card.schema]


def cpu_problem(op: str, m: int = 4) -> Problem:
    return replace(problem(op, m, {}), n=256, k=256, x_dtype=torch.float32, compute_dtype=torch.bfloat16, bias=True)


@pytest.mark.parametrize("op", [op for op in LINEAR if not op.startswith("sparse24")])
def test_timing_decides_between_cpu_implementations(op: str):
    asked = cpu_problem(op)
    tuned = tuning.implementation_of(op)
    outcome = autotune.tune(tuned, asked, budget=5)
    assert not outcome.failed and set(outcome.seconds) == set(tuned.split_candidates(asked)[0])
    # Without VNNI, sums of oneDNN's products saturate.
    assert len(outcome.seconds) >= 2 or any("gives wrong results" in reason for reason in outcome.refused.values())
    assert route(asked).name == outcome.config
    if route(asked).declined:
        assert "reference" not in outcome.seconds


sleepy_calls: list[int] = []


def sleepy(x: torch.Tensor, channel_scale: torch.Tensor | None = None) -> Any:
    sleepy_calls.append(len(x))
    return quantize_per_row(x, channel_scale)


def wrong(x: torch.Tensor, channel_scale: torch.Tensor | None = None) -> Any:
    q, scale = quantize_per_row(x, channel_scale)
    q[-1, -1] += 50
    return q, scale


class SleepyClock:
    """By it a call takes a second where ``sleepy`` was called, and a millisecond otherwise."""

    def prepare(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def watch(self) -> Callable[[], str | None]:
        return lambda: None

    def seconds(self, prepared: Callable[[], Any], count: int) -> list[float]:
        before = len(sleepy_calls)
        for _ in range(count):
            prepared()
        return [1.0 if len(sleepy_calls) > before else 1e-3] * count


@pytest.fixture
def impostors(monkeypatch: pytest.MonkeyPatch):
    """Two implementations preferred to the package's own: one that is slow, one that is wrong."""
    monkeypatch.setattr(tuning, "clock_for", lambda device, copies: SleepyClock())
    for name in ("sleepy", "wrong"):
        target = f"{__name__}:{name}"
        first = "Triton"
        register(Implementation(name, "quantize_per_row", lambda p: None if p.device == "cpu" else "no", target), first)
    yield
    for name in ("sleepy", "wrong"):
        unregister("quantize_per_row", name)


def test_first_use_finds_what_is_slow_and_refuses_what_is_wrong(impostors: None):
    x = torch.randn(3, 64)
    asked = Problem("quantize_per_row", 3, 64, 64, torch.float32)
    assert route(asked).name == "sleepy"
    with autotune.on_first_use():
        torch.ops.tilewright.quantize_per_row(x)
    decision = route(asked)
    assert decision.name == "blocks of rows"
    words = dict(decision.declined)["sleepy"]
    assert words.startswith("blocks of rows was the fastest when it was timed here on 2")
    assert words.endswith(", 1000.00 times as fast as sleepy")
    autotune.forget_tables()
    invalidate()
    assert route(asked).name == "blocks of rows"  # the table says so
    before = len(sleepy_calls)
    q, _ = torch.ops.tilewright.quantize_per_row(x)
    assert len(sleepy_calls) == before and q.shape == (3, 64)


def test_a_busy_machine_writes_nothing(impostors: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SleepyClock, "watch", lambda self: lambda: "other processes used 59% of the cores")
    asked = Problem("quantize_per_row", 3, 64, 64, torch.float32)
    outcome = autotune.tune(tuning.implementation_of(asked.op), asked, budget=5)
    assert outcome.config is None
    assert outcome.reason == "the machine is busy (other processes used 59% of the cores): nothing was written"
    with autotune.on_first_use():
        torch.ops.tilewright.quantize_per_row(torch.randn(3, 64))
    assert not tables.user_tables() and route(asked).name == "sleepy"


def test_tables_of_cpus_can_be_turned_off_or_put_elsewhere(
    impostors: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = Problem("quantize_per_row", 3, 64, 64, torch.float32)
    x = torch.randn(3, 64)
    monkeypatch.setenv("TILEWRIGHT_CPU_TABLE", str(tmp_path / "elsewhere" / "cpu.json"))
    with autotune.on_first_use():
        torch.ops.tilewright.quantize_per_row(x)
    assert tables.user_tables() == [tmp_path / "elsewhere" / "cpu.json"]
    assert route(asked).name == "blocks of rows"
    monkeypatch.setenv("TILEWRIGHT_CPU_TABLE", "off")
    autotune.forget_tables()
    before = len(sleepy_calls)
    with autotune.on_first_use():
        torch.ops.tilewright.quantize_per_row(x)
    assert len(sleepy_calls) == before + 1 and route(asked).name == "sleepy"
    assert not tables.entries_of(tuning.device_kind(asked))


def test_what_is_chosen_holds_for_any_number_of_threads():
    asked, before = cpu_problem("int8_linear"), torch.get_num_threads()
    try:
        kinds = set()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            kinds.add(tuning.device_kind(asked))
    finally:
        torch.set_num_threads(before)
    assert len(kinds) == 1


def test_a_user_can_fix_the_implementation():
    asked = cpu_problem("int4_linear")
    name = "int4_linear.implementation"
    default_decision = route(asked).name
    with autotune.constraints(name, implementation="dequantised blocks"):
        assert route(asked).name == "dequantised blocks"
        with pytest.raises(ValueError, match="nothing to multiply"):
            route(asked.with_rows(0))
    assert route(asked).name == default_decision != "dequantised blocks"
    with autotune.constraints(name, implementation="abacus"), pytest.raises(ValueError, match="implementation=abacus"):
        route(asked)


def test_asking_the_router_never_tunes(impostors: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TILEWRIGHT_AUTOTUNE", "1")
    assert route(Problem("quantize_per_row", 3, 64, 64, torch.float32)).name == "sleepy"


def test_a_table_cannot_route_to_what_does_not_take_the_problem():
    asked = cpu_problem("int4_linear")
    tuned = tuning.implementation_of("int4_linear")
    device = tuning.device_kind(asked)
    before = route(asked).name
    for name in ("Triton, fused", "no such implementation", 7):
        key = tables.key_of(tuned.name, tuning.facts_of(asked), device.driver, tuned.source())
        tables.remember(device, {key: {"config": {"implementation": name}}})
        assert route(asked).name == before


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_results_are_right_while_tuning(op: str, m: int):
    asked = cpu_problem(op, m)
    arguments = make_arguments(asked)
    with autotune.on_first_use():
        y = getattr(torch.ops.tilewright, op)(**arguments)
    from bench.problems import exact_result, plain_result

    assert_close_as_plain(y, plain_result(op, arguments), exact_result(op, arguments))


@pytest.mark.parametrize("card", cards(), ids=lambda card: card.name)
def test_candidates_are_compared_with_the_definition(card: Card):
    asked = card.example if card.example.conv is not None else card.example.with_rows(9)
    arguments = make_arguments(asked)
    result = router.implementations(card.name)[-1].function(**arguments)
    assert tuning.Checker(card.name, arguments)(result) is None
    first = result[0] if isinstance(result, tuple) else result
    first[0, ..., -1] += 1000 if first.dtype == torch.float32 else 50
    assert "against the definition" in str(tuning.Checker(card.name, arguments)(result))


# On a CPU the two of integers have one implementation: it hands them on to a dense operator, which has several.
@pytest.mark.parametrize(
    "kind, tuned",
    [
        (Sparse24Linear, "sparse24_linear"),
        (Sparse24Int8Linear, "int8_linear"),
        (Sparse24Int4Linear, "int4_linear"),
    ],
)
def test_first_use_tunes_layers_with_a_sparse_weight(kind: type[Sparse24Linear], tuned: str):
    torch.manual_seed(0)
    layer, x = kind.from_float(torch.nn.Linear(256, 64)), torch.randn(3, 256)
    before = layer(x)
    if tuned == "sparse24_linear":
        serving = [each.name for each in implementations(tuned) if each.why_not(layer.problem(3)) is None]
        if len(serving) == 2:  # the last is the definition
            pytest.skip("on this processor there is nothing to choose from")
    with autotune.on_first_use():
        y = layer(x)
    torch.testing.assert_close(y, before, rtol=1e-2, atol=1e-2)
    assert f'"{tuned}.implementation' in tables.table_path(tuning.device_kind(layer.problem(3))).read_text()


@pytest.mark.parametrize("op", [*LINEAR, "int8_linear_quantized", "quantize_per_row", "rms_norm_quantize"])
def test_sample_arguments_are_what_the_operator_takes(op: str):
    for m, n, k in ((3, 17, 65), (1, 1, 1), (0, 4, 8)):
        asked = Problem(op, m, n if "linear" in op else 0, k, torch.float16, bias=True, residual=True, symmetric=False)
        result = getattr(torch.ops.tilewright, op)(**make_arguments(asked))
        first = result[0] if isinstance(result, tuple) else result
        assert first.shape == (m, n if "linear" in op else k)
        meta = make_arguments(asked, "meta")
        for name, value in make_arguments(asked).items():
            assert isinstance(value, torch.Tensor) == isinstance(meta[name], torch.Tensor)
            if isinstance(value, torch.Tensor):
                assert (value.shape, value.dtype) == (meta[name].shape, meta[name].dtype)
    assert [field.name for field in dataclasses.fields(Problem)][-1] == "aligned"
