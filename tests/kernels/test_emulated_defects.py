"""That rung 5 can fail: real kernels with one defect of each class, and what is said of it.

Every defect is put into code that passes without it. The interpreter, compiling and reading the PTX find none of
removed barriers, removed waits and misaligned vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from bench.catalogue import FAMILIES
from bench.problems import Shape, make_arguments
from tests.aot.small_kernels import row_sum_kernel
from tests.gpu.compare import check
from tilewright import aot
from tilewright.aot.emulator import AsyncHazard, Misaligned, OutOfBounds, PTXError, RaceError, emulate

pytestmark = pytest.mark.aot
RAGGED = Shape(19, 75, 299, torch.float16, group_size=32)
PIPELINED = Shape(128, 256, 1024, torch.float16, group_size=128)


def planned(name: str, shape: Shape, stages: int = 1) -> tuple[Any, Any, dict[str, Any]]:
    """(launch, output, arguments) of the family's first config with at least ``stages`` that is one launch."""
    family = next(family for family in FAMILIES if family.name == name)
    for config in family.configs:
        arguments = make_arguments(family.op, shape)
        launches, outputs = family.plan(arguments, config)
        if len(launches) == 1 and launches[0].num_stages >= stages:
            return launches[0], outputs, arguments
    raise LookupError(f"{name} has no such config")


def run_defective(launch: aot.Launch, target: str, change: Callable[[str], str]) -> None:
    """Emulate ``launch`` as compiled, which must go well, then with its PTX changed, which must differ."""
    compiled = aot.compile_launch(launch, target)
    compiled.emulate(launch.grid, launch.args, profile=False)
    changed = change(compiled.ptx)
    assert changed != compiled.ptx, "the defect is not in the code"
    replace(compiled, text=changed).emulate(launch.grid, launch.args, profile=False)


def without(pattern: str) -> Callable[[str], str]:
    return lambda ptx: re.sub(pattern, "", ptx)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("access", ["ld", "st"])
@pytest.mark.parametrize("family", ["int8_linear swapped", "int4_linear fused", "quantize"])
def test_a_dropped_mask_is_out_of_bounds(family: str, access: str, target: str) -> None:
    launch, _, _ = planned(family, RAGGED)
    with pytest.raises(OutOfBounds, match="past the end of"):
        run_defective(launch, target, lambda ptx: re.sub(rf"@!?%p\d+ ({access}\.global)", r"\1", ptx))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("family", ["int8_linear tile", "int4_linear fused", "quantize"])
def test_a_removed_barrier_is_a_race(family: str, target: str) -> None:
    launch, _, _ = planned(family, PIPELINED)
    with pytest.raises((RaceError, AsyncHazard)):
        run_defective(launch, target, without(r"bar(rier)?\.sync\s+0;"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("family", ["int8_linear tile", "int4_linear fused"])
def test_a_removed_wait_for_copies_is_a_hazard(family: str, target: str) -> None:
    launch, _, _ = planned(family, PIPELINED, stages=3)
    with pytest.raises(AsyncHazard):
        run_defective(launch, target, without(r"cp\.async\.wait_group\s+\S+;"))


def test_a_removed_wait_for_a_product_is_a_hazard() -> None:
    launch, _, _ = planned("int8_linear tile", PIPELINED)
    with pytest.raises(PTXError, match="wgmma"):
        run_defective(launch, "sm_90", without(r"wgmma\.wait_group\.sync\.aligned\s+\S+;"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("family", ["int4_linear fused", "int4_int8_linear fused"])
def test_a_wrong_scale_group_is_a_wrong_result(family: str, target: str) -> None:
    launch, outputs, arguments = planned(family, replace(PIPELINED, m=16))
    op = next(one.op for one in FAMILIES if one.name == family)
    aot.emulate_launch(launch, target, profile=False)
    check(op, outputs[0], arguments)
    of_the_next_group = launch.args["scale_ptr"].roll(1, dims=0)  # [groups, N]
    wrong = replace(launch, args={**launch.args, "scale_ptr": of_the_next_group})
    aot.emulate_launch(wrong, target, profile=False)
    with pytest.raises(AssertionError, match="exceeds twice the plain expression's"):
        check(op, outputs[0], arguments)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_an_offset_that_wraps_is_out_of_bounds(target: str) -> None:
    stride = (1 << 30) + 16
    # Reserved, and touched in three rows of four bytes only.
    matrix = torch.empty(2 * stride + 4, dtype=torch.int8).as_strided((3, 4), (stride, 1))
    matrix.fill_(1)
    sums = torch.zeros(3, dtype=torch.int32)
    args = {"matrix_ptr": matrix, "sums_ptr": sums, "stride": stride}
    wide = aot.Launch(row_sum_kernel, (3,), args, {"WIDE": True})
    aot.emulate_launch(wide, target)
    assert sums.tolist() == [4, 4, 4]
    with pytest.raises(OutOfBounds):
        aot.emulate_launch(replace(wide, constants={"WIDE": False}), target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("family", ["int8_linear tile", "int4_linear fused", "quantize"])
def test_an_unaligned_view_is_misaligned_in_code_for_aligned_ones(family: str, target: str) -> None:
    launch, outputs, arguments = planned(family, replace(PIPELINED, k=64) if family == "quantize" else PIPELINED)
    compiled = aot.compile_launch(launch, target)
    x = next(name for name in launch.args if name.startswith("x") and launch.args[name].dim() == 2)
    tensor = launch.args[x]
    off = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    off.copy_(tensor)
    args = {**launch.args, x: off}
    with pytest.raises(ValueError, match=f"{x} was promised to be divisible by 16"):
        compiled.emulate(launch.grid, args)
    values = [args[name] for name in compiled.specialization.run_time]
    with pytest.raises(Misaligned):
        emulate(compiled.ptx, launch.grid, compiled.num_warps, values, int(target[3:]), shared=compiled.shared_bytes)
    # What the launcher derives from this view is other code, and right.
    aot.emulate_launch(replace(launch, args=args), target)
    op = next(one.op for one in FAMILIES if one.name == family)
    check(op, outputs if op == "quantize_per_row" else outputs[0], arguments)
