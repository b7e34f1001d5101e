"""The classes of bugs that libraries like this one have shipped, and the tests that keep us from them.

Each class has a number. ``TESTS`` says where each is tested; every place named there must exist.

     1  32-bit offsets past 2^31 elements              8  int8 sums that overflow without VNNI
     2  non-contiguous input read as contiguous        9  converting layers whose weight others read
     3  zero rows, NaN, Inf, one huge value           10  state that does not save or reload
     4  empty dimensions, single elements, 1-D        11  casting, copying, pickling, the meta device
     6  launched on the wrong device                  12  hostile checkpoints
     7  results that depend on the batch or the run   14  int8 dots on targets that get them wrong
                                                      15  tolerances that pass anything
                                                      28  memory of replaced storage
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from tests.tolerance import assert_close_as_plain, ulp

ROOT = Path(__file__).resolve().parents[2]

TESTS = {
    1: (
        "tests/interpreter/test_int4_linear.py::test_rows_further_apart_than_32_bits_count",
        "tests/gpu/test_operators.py::test_offsets_past_2_to_the_31",
    ),
    2: (
        "tests/kernels/test_cpu.py::test_leading_dimensions_and_strides",
        "tests/kernels/test_cpu.py::test_a_weight_is_not_taken_for_its_transpose",
        "tests/kernels/test_ops.py::test_compiled_with_a_strided_input",
        "tests/contracts/test_forward.py::test_shapes_and_strides",
    ),
    3: (
        "tests/kernels/test_cpu.py::test_a_row_without_a_number_stays_without_one_and_alone",
        "tests/kernels/test_cpu.py::test_a_huge_row_and_a_zero_row_change_no_other",
        "tests/contracts/test_forward.py::test_a_row_without_a_number_stays_without_one_and_alone",
        "tests/contracts/test_not_finite.py::test_a_network",
        "tests/contracts/test_not_finite.py::test_nan_stays_where_a_plain_layer_has_it",
        "tests/deploy/test_onnx.py::test_what_is_not_finite_is_seen_behind_static_int8",
        "tests/contracts/test_forward.py::test_a_huge_value_in_one_row_changes_no_other",
    ),
    4: (
        "tests/kernels/test_references.py::test_any_problem",
        "tests/kernels/test_cpu.py::test_no_shape_crashes_the_process",
        "tests/kernels/test_ops.py::test_gradients_of_empty_and_single_problems",
        "tests/contracts/test_forward.py::test_empty_batches",
        "tests/contracts/test_forward.py::test_smallest_layers",
    ),
    6: (
        "tests/gpu/test_operators.py::test_tensors_on_another_device_than_the_current_one",
        "tests/kernels/test_ops.py::test_bad_arguments_are_named",
        "tests/contracts/test_forward.py::test_errors_name_the_layer",
    ),
    7: (
        "tests/kernels/test_cpu.py::test_a_row_does_not_depend_on_its_batch",
        "tests/kernels/test_cpu.py::test_runs_repeat_to_the_bit",
        "tests/contracts/test_batch.py::test_rows",
        "tests/contracts/test_forward.py::test_runs_repeat_to_the_bit_in_any_mode_and_thread",
    ),
    8: ("tests/kernels/test_cpu.py::test_int8_sums_are_exact_at_the_extremes",),
    9: ("tests/convert/",),
    10: (
        "tests/convert/",
        "tests/contracts/test_state.py::test_the_state_dict_holds_plain_canonical_tensors",
        "tests/contracts/test_state.py::test_safetensors_round_trip",
        "tests/contracts/test_state.py::test_loading_into_a_module_that_has_run",
    ),
    11: (
        "tests/contracts/test_state.py::test_casting_leaves_scales_as_they_are",
        "tests/contracts/test_state.py::test_copies",
        "tests/contracts/test_state.py::test_built_on_the_meta_device_and_filled",
    ),
    12: ("tests/convert/",),
    14: ("tests/kernels/test_router.py::test_problems_of_absent_gpus_can_be_asked_about", "tests/interpreter/"),
    15: ("tests/contracts/test_known_bugs.py::test_the_bar_does_not_pass_a_wrong_result",),
    28: (
        "tests/contracts/test_replaced_storage.py::test_a_tensor_of_a_layer",
        "tests/contracts/test_replaced_storage.py::test_a_layer",
        "tests/contracts/test_replaced_storage.py::test_a_model",
        "tests/kernels/dispatch/test_layers.py::test_a_call_reads_no_memory_that_is_freed",
    ),
}


@pytest.mark.parametrize("number, place", [(number, place) for number, places in TESTS.items() for place in places])
def test_the_place_exists(number: int, place: str) -> None:
    path, _, function = place.partition("::")
    if not function:
        assert any(ROOT.joinpath(path).rglob("test_*.py")), f"class {number}: no tests in {path}"
        return
    tree = ast.parse(ROOT.joinpath(path).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_bar_passes_what_is_as_good_as_plain_pytorch() -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_close_as_plain(exact.to(dtype), exact.to(dtype), exact)


@pytest.mark.parametrize("k", [64, 4096, 1 << 16])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda y: y * 1.0001, id="a scale off by a ten-thousandth"),
        pytest.param(lambda y: y.index_fill(1, torch.tensor([3]), 0.0), id="a column of zeros"),
        pytest.param(lambda y: y.index_fill(0, torch.tensor([0]), torch.nan), id="a row of NaN"),
        pytest.param(lambda y: y.roll(1, 0), id="rows out of place"),
        pytest.param(lambda y: y.to(torch.bfloat16).float(), id="rounded to bfloat16 on the way"),
    ],
)
def test_the_bar_does_not_pass_a_wrong_result(wrong: object, k: int) -> None:
    """Whatever K is: a tolerance that grew with it would pass all of these at last."""
    x, weight = torch.randn(8, k), torch.randn(32, k)
    plain, exact = x @ weight.t(), x.double() @ weight.double().t()
    with pytest.raises(AssertionError):
        assert_close_as_plain(wrong(plain), plain, exact)  # type: ignore[operator]


def test_an_ulp_is_the_distance_to_the_next_number() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([1.0, 1.5, 3.0, 1000.0, 2.0**-100], dtype=dtype)
        following = torch.nextafter(x, torch.full_like(x, torch.inf))
        assert torch.equal(ulp(x.double(), dtype), following.double() - x.double())
