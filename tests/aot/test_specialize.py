"""What the launcher would compile is read from the arguments as Triton reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.aot.small_kernels import arguments_kernel, copy_kernel
from tilewright.aot.launch import Launch
from tilewright.aot.specialize import backend_of, specialize
from tilewright.aot.targets import TARGETS

pytestmark = pytest.mark.aot
EVERY_TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def copy_launch(source: torch.Tensor, target: torch.Tensor | None, count: int, stride: int) -> Launch:
    args = {"source_ptr": source, "target_ptr": target, "count": count, "stride": stride}
    return Launch(copy_kernel, (1,), args, {"BLOCK": 128})


@EVERY_TARGET
@pytest.mark.parametrize(
    "offset, divisible",
    [(0, True), (8, True), (1, False), (4, False)],
)
def test_the_address_of_a_tensor_is_taken_from_its_offset(target, offset: int, divisible: bool) -> None:
    source = torch.empty(1024, dtype=torch.float16, device="meta")[offset:]
    special = specialize(copy_launch(source, source, 5, 3), target)
    assert special.signature["source_ptr"] == "*fp16"
    assert ("source_ptr" in special.divisible()) == divisible


@EVERY_TARGET
@pytest.mark.parametrize(
    "value, kind, divisible",
    [
        (0, "i32", True),
        (1, "constexpr", False),
        (16, "i32", True),
        (17, "i32", False),
        (-32, "i32", True),
        (2**31 - 1, "i32", False),
        (2**31, "i64", True),
        (2**40 + 1, "i64", False),
    ],
)
def test_integers(target, value: int, kind: str, divisible: bool) -> None:
    source = torch.empty(4, device="meta")
    special = specialize(copy_launch(source, source, value, 3), target)
    assert special.signature["count"] == kind
    assert ("count" in special.divisible()) == divisible


@EVERY_TARGET
def test_absent_pointers_ones_and_constants_are_compiled_in(target) -> None:
    special = specialize(copy_launch(torch.empty(4, device="meta"), None, 5, 1), target)
    assert special.constants == {(1,): None, (3,): 1, (4,): 128}
    assert special.run_time == ("source_ptr", "count")


@EVERY_TARGET
def test_a_parameter_that_asks_not_to_be_specialised_is_not(target) -> None:
    args = {"pointer": torch.empty(1, device="meta"), "rows": 1, "number": 16, "fraction": 0.5, "flag": True}
    special = specialize(Launch(arguments_kernel, (1,), args, {"SIZE": 4}), target)
    assert special.signature == {
        "pointer": "*fp32",
        "rows": "i32",
        "number": "i32",
        "fraction": "fp32",
        "flag": "u1",
        "SIZE": "constexpr",
    }
    assert special.divisible() == {"pointer", "number"}


ARGUMENTS: list[dict[str, Any]] = [
    {"source_ptr": torch.zeros(64, dtype=dtype)[offset:], "target_ptr": target, "count": count, "stride": stride}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64)
    for offset in (0, 3, 16)
    for target in (None, torch.zeros(64, dtype=dtype))
    for count, stride in ((1, 1), (16, 48), (2**33, 7))
]


@pytest.mark.skipif(
    not hasattr(JITFunction, "_pack_args"), reason="before Triton 3.5 the launcher had this inside run()"
)
@EVERY_TARGET
def test_it_is_what_the_launcher_itself_derives(target) -> None:
    backend = backend_of(target)
    bind = create_function_from_signature(copy_kernel.signature, copy_kernel.params, backend)
    for args in ARGUMENTS:
        bound, found, options = bind(**args, BLOCK=128)
        _, signature, constants, attributes = copy_kernel._pack_args(backend, options, bound, found, options)
        special = specialize(Launch(copy_kernel, (1,), args, {"BLOCK": 128}), target)
        assert special.signature == signature
        assert special.constants == constants
        # A promise of nothing may be listed or not.
        assert {k: v for k, v in special.attributes.items() if v} == {k: v for k, v in attributes.items() if v}


def test_wrong_arguments_are_named() -> None:
    launch = Launch(copy_kernel, (1,), {"source_ptr": torch.empty(4), "cuont": 3}, {"BLOCK": 128})
    with pytest.raises(ValueError, match=r"copy_kernel: unknown arguments \['cuont'\], missing .*'count'"):
        specialize(launch, TARGETS["sm_90"])


def test_something_else_than_a_kernel_is_refused() -> None:
    with pytest.raises(TypeError, match=r"@triton\.jit function is needed, not function"):
        specialize(Launch(lambda: None, (1,), {}), TARGETS["sm_90"])
