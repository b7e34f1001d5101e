"""Rungs 4 and 5 for what is special about 2:4 kernels: the order of operands, the instructions, NaN, the gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from bench.catalogue import FAMILIES, Family
from bench.problems import Shape, make_arguments
from tests.gpu.compare import check
from tilewright import aot
from tilewright.aot.compiler import compile_launch
from tilewright.aot.targets import find_target
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import route
from tilewright.kernels.formats import sparse24
from tilewright.kernels.sparse24_linear import cusparselt, fragments, gate, layout, triton_fragments

BY_NAME = {family.name: family for family in FAMILIES}
each_family = pytest.mark.parametrize("name", ["sparse24_linear mma.sp", "sparse24_int8_linear mma.sp"])
GPU: dict[str, Any] = {"device": "cuda", "capability": (9, 0), "multiprocessors": 132}
A100: dict[str, Any] = {"device": "cuda", "capability": (8, 0), "multiprocessors": 108}


def two_of_four(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(0)).to(dtype)
    return sparse24.pack(weight, sparse24.best_mask(torch.rand(n, k)))


# ---- orders
@pytest.mark.parametrize("k", [1, 75, 128, 512, 700])
@pytest.mark.parametrize("kind", [layout.FLOAT, layout.INT8])
def test_steps_hold_every_value_where_the_kernel_takes_it(kind: int, k: int) -> None:
    """By the definition at the top of ``layout.py``, a weight at a time."""
    n, per_step = 3, layout.blocks_per_step(kind)
    values, meta = two_of_four(n, k, torch.int8 if kind == layout.INT8 else torch.float16)
    dense = torch.zeros(n, layout.step_count(kind, k) * per_step * 128)
    dense[:, :k] = sparse24.unpack(values, meta, k).float()
    words = layout.pack_mask(meta, kind, k).reshape(n, -1, 32)
    packed = layout.pack_values(values, kind, k).reshape(n, -1, per_step, 2, 32).float()
    found = torch.zeros_like(dense)
    for step, block, i in torch.cartesian_prod(*map(torch.arange, (packed.shape[1], per_step, 32))).tolist():
        for row in range(n):
            taken = 0
            for c in range(4):
                if words[row, step, i] >> (4 * block + c) & 1:
                    found[row, (step * per_step + block) * 128 + 4 * i + c] = packed[row, step, block, taken, i]
                    taken += 1
    assert torch.equal(found, dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_fragments_are_those_that_pytorch_gives_cutlass(dtype: torch.dtype) -> None:
    """Metadata of torch's own converter, which its kernels load lane by lane: an independent witness."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    is_int8 = dtype == torch.int8
    # torch orders 32 rows of 16-bit values as two tiles of one step: here they are two steps of one tile.
    values, meta = two_of_four(16 if is_int8 else 32, 64 if is_int8 else 32, dtype)
    values = torch.where(values == 0, torch.ones_like(values), values)  # the converter must see which two were kept
    k = 64 if is_int8 else 32
    _, theirs = sparse_semi_structured_from_dense_cutlass(sparse24.unpack(values, meta, k))
    if is_int8:
        groups = torch.arange(16).reshape(4, 4).t().flatten()  # undo the permutation of groups
        places = sparse24.unpack_places(meta, k)
        inverse = torch.empty_like(places)
        inverse[:, groups] = places
        mine = fragments.pack_meta(sparse24.pack_places(inverse), k, True)[0, 0, 0]
    else:
        mine = fragments.pack_meta(torch.cat([meta[:16], meta[16:]], 1), 64, False)[0, 0, 0]
    assert torch.equal(mine, theirs.reshape(-1).view(torch.int32))


def test_padding_of_fragments_ascends() -> None:
    values, meta = two_of_four(5, 36, torch.float16)
    registers = fragments.pack_meta(meta, 36, False)
    nibbles = torch.stack([registers >> shift & 15 for shift in range(0, 32, 4)])
    assert set(nibbles.unique().tolist()) <= set(sparse24.VALID)
    assert fragments.pack_values(values, 36).shape == (1, 1, 4, 32, 4)


def test_bad_places_are_refused_before_the_instruction_sees_them() -> None:
    values, meta = two_of_four(16, 128, torch.float16)
    meta[3, 2] = 0
    with pytest.raises(ValueError, match="no 2:4 pattern: row 3 keeps the places 0 and 0 of group 4"):
        fragments.fragment_order(values, meta, 128, torch.float16)


# ---- the instruction
def launches(name: str, shape: Shape, block_m: int = 8) -> tuple[Any, Any, dict[str, Any]]:
    family: Family = BY_NAME[name]
    config = next(c for c in family.configs if c.block_m == block_m and c.splits == 1)
    arguments = make_arguments(family.op, shape)
    (launch,), (out,) = family.plan(arguments, config)
    return launch, out, arguments


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
@each_family
def test_the_machine_code_holds_the_sparse_instruction(name: str, target: str) -> None:
    launch, _, _ = launches(name, Shape(8, 64, 256, torch.bfloat16))
    compiled = compile_launch(launch, find_target(target))
    assert compiled.instructions.matrix.keys() == {"mma.sp"}
    opcode = "IMMA.SP.16864.S8.S8" if "int8" in name else "HMMA.SP.16832.F32.BF16"
    assert compiled.sass.matrix == {opcode: compiled.instructions.matrix["mma.sp"]}
    assert compiled.spill_bytes == 0
    assert compiled.instructions.loads.get(16, 0) >= 4
    assert "shfl" not in compiled.ptx.split("mma.sp")[0]


@pytest.mark.aot
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("block_m", [8, 16])
@each_family
def test_a_row_without_a_number_stays_without_one_and_alone(name: str, block_m: int, bad: float) -> None:
    """Though only half of the weights meet it."""
    rows = block_m - 1
    family: Family = BY_NAME[name]
    config = next(c for c in family.configs if c.block_m == block_m and c.splits == 1)
    arguments = make_arguments(family.op, Shape(rows, 64, 128, torch.bfloat16))
    found = []
    for value in (None, bad):
        if value is not None:
            arguments["x"][rows - 2, 77] = value
        (launch,), (out,) = family.plan(arguments, config)
        aot.emulate_launch(launch, "sm_90", profile=False)
        found.append(out)
    others = [row for row in range(rows) if row != rows - 2]
    assert torch.equal(found[0][others], found[1][others])
    assert not found[1][rows - 2].isfinite().any()


@pytest.mark.aot
def test_rows_that_are_not_aligned_are_copied_first() -> None:
    """Registers would go to other threads: the launcher must see to 16 bytes."""
    launch, out, arguments = launches("sparse24_int8_linear mma.sp", Shape(5, 64, 256, torch.bfloat16))
    assert launch.args["x_ptr"].data_ptr() % 16 == 0
    wide = torch.zeros(5, 300, dtype=torch.int8)
    x = wide[:, 3:259]
    x.copy_(launch.args["x_ptr"].view(torch.int8))
    weight = fragments.fragment_order(arguments["weight_values"], arguments["weight_meta"], 256, torch.int8)
    again = torch.full_like(out, torch.nan)
    (other,) = triton_fragments.plan_fragments(
        x,
        weight,
        again,
        bias=arguments["bias"],
        residual=None,
        activation="none",
        compute_dtype=torch.int8,
        config=triton_fragments.CONFIGS[0],
        x_scale=launch.args["x_scale_ptr"],
        w_scale=arguments["weight_scale"],
    )
    assert other.args["x_ptr"].data_ptr() % 16 == 0
    for one in (launch, other):
        aot.emulate_launch(one, "sm_80", profile=False)
    assert torch.equal(out, again)
    check("sparse24_int8_linear", again, arguments)


def test_a_weight_that_is_not_aligned_is_refused() -> None:
    weight = fragments.fragment_order(*two_of_four(16, 128, torch.float16), 128, torch.float16)
    flat = torch.cat([weight.values.new_zeros(1), weight.values.flatten()])[1:].view_as(weight.values)
    moved = fragments.FragmentWeight(flat, weight.meta, 16, 128, False)
    out = torch.empty(2, 16)
    options = {"bias": None, "residual": None, "activation": "none", "compute_dtype": torch.float16}
    options["config"] = triton_fragments.CONFIGS[0]
    with pytest.raises(ValueError, match="must be aligned to 16 bytes"):
        triton_fragments.plan_fragments(torch.zeros(2, 128).half(), moved, out, **options)
    with pytest.raises(ValueError, match="inline PTX"):
        triton_fragments.plan_fragments(torch.zeros(2, 128).half(), weight, out, inline_ptx=False, **options)


# ---- who serves
@pytest.mark.parametrize("op, most", gate.FRAGMENT_ROWS.items())
def test_small_batches_go_to_the_sparse_instruction_and_others_by_the_gate(op: str, most: int) -> None:
    rows = (1, most, most + 1, 64, 65)
    by_arithmetic = {m: route(Problem(op, m, 4096, 4096, torch.bfloat16, **A100)).name for m in rows}
    assert by_arithmetic == {
        1: "Triton, mma.sp",
        most: "Triton, mma.sp",
        most + 1: "Triton, unpacked in registers",
        64: "Triton, unpacked in registers",
        65: "unpacked once, then dense",
    }
    measured = {m: route(Problem(op, m, 4096, 4096, torch.bfloat16, **GPU)).name for m in rows}
    assert measured == {m: "Triton, mma.sp" if m <= most else "unpacked once, then dense" for m in rows}


def test_int4_is_unpacked_in_registers_where_nobody_has_measured_it() -> None:
    for m in (1, 64):
        problem = Problem("sparse24_int4_linear", m, 4096, 4096, torch.bfloat16, group_size=128, **A100)
        assert route(problem).name == "Triton, unpacked in registers"
    decision = route(Problem("sparse24_int4_linear", 1, 4096, 4096, torch.bfloat16, group_size=128, **GPU))
    assert decision.name == "unpacked once, then dense"
    assert "kept dense: 2:4 does not pay for this shape (for every batch dense" in str(decision)


@pytest.mark.parametrize("op", ["sparse24_linear", "sparse24_int8_linear", "sparse24_int4_linear"])
@pytest.mark.parametrize("m, n, k", [(1, 384, 384), (256, 4096, 4096), (4096, 512, 4096)])
def test_what_2_4_does_not_pay_for_is_kept_dense_in_words(op: str, m: int, n: int, k: int) -> None:
    decision = route(Problem(op, m, n, k, torch.bfloat16, group_size=128, **GPU))
    assert decision.name == "unpacked once, then dense"
    reasons = [reason for _, reason in decision.declined if not reason.endswith("not on cuda")]
    assert reasons and all(reason.startswith(gate.KEPT_DENSE) for reason in reasons)


def test_what_another_kernel_serves_is_not_called_dense() -> None:
    for m in (1, 16, 17, 64):
        decision = route(Problem("sparse24_linear", m, 4096, 4096, torch.bfloat16, **A100))
        assert decision.name.startswith("Triton")
        assert not any(gate.KEPT_DENSE in reason for _, reason in decision.declined)


def test_int4_groups_that_cut_a_block_and_other_dtypes_are_served_by_others() -> None:
    problem = Problem("sparse24_int4_linear", 4, 4096, 4096, torch.bfloat16, group_size=64, **A100)
    assert "groups of 64 columns" in str(route(problem))
    problem = Problem("sparse24_linear", 4, 4096, 4096, torch.float32, **GPU)
    assert route(problem).name == "unpacked once, then dense"
    amd = {"device": "cuda", "gpu_arch": "gfx942", "multiprocessors": 304}
    assert route(Problem("sparse24_linear", 4, 4096, 4096, torch.bfloat16, **amd)).name.endswith("in registers")


# ---- the vendor's product
@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuSPARSELt as PyTorch calls it, on a CPU: shapes and strides as it demands them, the arithmetic plain."""

    def compress(weight: torch.Tensor) -> torch.Tensor:
        multiple = 32 if weight.dtype == torch.int8 else 16
        assert weight.is_contiguous() and all(size % multiple == 0 for size in weight.shape)
        assert sparse24.why_not_24(weight) is None
        return weight.clone()

    def multiply(
        compressed: torch.Tensor, dense: torch.Tensor, *, out_dtype: torch.dtype, transpose_result: bool
    ) -> torch.Tensor:
        assert dense.t().is_contiguous() and dense.shape[1] % (16 if dense.dtype == torch.int8 else 8) == 0
        assert transpose_result
        return (compressed.double() @ dense.double()).t().contiguous().to(out_dtype)

    monkeypatch.setattr(torch, "_cslt_compress", compress, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply, raising=False)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("m", [1, 8, 77])
def test_the_vendors_product_gets_what_it_wants(m: int) -> None:
    shape = Shape(m, 64, 96, torch.bfloat16, activation="gelu", residual=True)
    arguments = make_arguments("sparse24_linear", shape)
    check("sparse24_linear", cusparselt.sparse24_linear(**arguments), arguments)
    arguments["x"][0, 5] = torch.inf
    y = cusparselt.sparse24_linear(**arguments)
    assert not y[0].isfinite().any()
    assert y[1:].isfinite().all()


def test_the_vendors_product_takes_large_problems_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt, "why_no_cusparselt", lambda: None)
    problem = Problem("sparse24_linear", 4096, 4096, 4096, torch.bfloat16, **GPU)
    assert cusparselt.why_not(problem) is None
    assert cusparselt.why_cannot(problem.with_rows(64)) is None
    assert cusparselt.why_not(problem.with_rows(65)).startswith(gate.KEPT_DENSE)
    assert cusparselt.why_not(problem.with_rows(8)) == "libraries are slower than dense below 512 rows"
    assert "multiples of 16" in str(
        cusparselt.why_not(Problem("sparse24_linear", 4096, 4097, 4096, torch.float16, **GPU))
    )
