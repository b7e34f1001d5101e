"""When inline assembly with ``pack=4`` is handed a thread's own four registers, and when it silently is not.

A kernel that feeds a warp-wide instruction from inline assembly rests on this. Where a condition fails, Triton compiles
without complaint and packs elements of other rows: the launcher must check the conditions.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")

from tests.aot.small_kernels import first_of_four_kernel
from tilewright import aot

pytestmark = pytest.mark.aot


def own_registers(rows: int, num_warps: int, promise: str, target: str) -> bool:
    """Whether each row of [rows, 4] came to one call of the assembly, in order."""
    types = {"source_ptr": f"*i32{promise}", "target_ptr": f"*i32{promise}"}
    compiled = aot.compile(first_of_four_kernel, types, {"ROWS": rows}, aot.Config(num_warps), target)
    source = torch.arange(4 * rows, dtype=torch.int32).view(rows, 4)
    result = torch.full_like(source, -1)
    compiled.emulate((1,), [source, result])
    return torch.equal(result, source[:, :1].expand(rows, 4))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "rows, num_warps, promise, whole",
    [
        (32, 1, ":16", True),
        (256, 4, ":16", True),
        (64, 4, ":16", False),  # fewer rows than threads
        (128, 4, "", False),  # pointers that may lie anywhere
    ],
)
def test_aligned_rows_for_every_thread_come_whole(
    rows: int, num_warps: int, promise: str, whole: bool, target: str
) -> None:
    assert own_registers(rows, num_warps, promise, target) == whole


@pytest.mark.parametrize("offset, whole", [(4, True), (1, False)])
def test_views_at_an_odd_place_are_mixed_without_a_word(offset: int, whole: bool) -> None:
    """What a launcher that does not look at ``data_ptr() % 16`` would get: no error, and wrong operands."""
    source, result = (torch.arange(4 * 128 + 4, dtype=torch.int32)[offset:][: 4 * 128].view(128, 4) for _ in range(2))
    launch = aot.Launch(first_of_four_kernel, (1,), {"source_ptr": source, "target_ptr": result}, {"ROWS": 128})
    aot.emulate_launch(launch, "sm_80")
    assert torch.equal(result, source[:, :1].expand(128, 4)) == whole
