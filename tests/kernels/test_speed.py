"""What the CPU path owes to a float32 model: each ratio at 4096 x 4096, with float32 input, in eager mode.

Both sides run in turns in one process, after the result has been found right, and their medians are compared. A turn is
a block of calls, of which the first quarter is not counted: each side has the cache to itself, as a layer that is
called again and again has. (Called once in a while, both must fetch their weight, and no int8 layer can be more than
four times as fast at one row; ``bench/cpu_linear.py`` measures that.) The machines that run this are shared, so a ratio
may be measured up to six times; a slow implementation misses it each time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.probes import why_no_int4pack, why_no_qlinear
from tilewright.nn import Int4Linear, Int8Linear, QuantizedLinear

SIZE, ATTEMPTS = 4096, 6
#: By rows, less than was measured with AVX2 alone (docs/cpu.md says why it is not more).
INT8_WITH_AVX2 = {1: 3.0, 16: 3.0, 128: 2.0, 512: 1.7}
INT4_WITH_AVX2 = {1: 3.0, 16: 2.0, 128: 1.5, 512: 1.2}
pytestmark = pytest.mark.perf


@pytest.fixture(scope="module")
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(SIZE, SIZE)


@pytest.fixture(scope="module")
def int8(linear: nn.Linear) -> QuantizedLinear:
    return Int8Linear.from_float(linear)


@pytest.fixture(scope="module")
def int4(linear: nn.Linear) -> QuantizedLinear:
    return Int4Linear.from_float(linear, group_size=128)


def ratio(theirs: Callable[[], object], ours: Callable[[], object], seconds: float = 1.5, block: int = 40) -> float:
    """Median time of ``theirs`` over that of ``ours``, taken in turns of ``block`` calls."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times[0]:
        for run, taken in zip((theirs, ours), times, strict=True):
            for i in range(block):
                start = time.perf_counter()
                run()
                if i >= block // 4:
                    taken.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def check(linear: nn.Linear, module: QuantizedLinear, m: int, required: float, error: float) -> None:
    x = torch.randn(m, SIZE)
    with torch.inference_mode():
        expected = linear(x)
        assert (module(x) - expected).norm() < error * expected.norm()
        found = []
        for _ in range(ATTEMPTS):
            found.append(ratio(lambda: linear(x), lambda: module(x)))
            if found[-1] >= required:
                return
    pytest.fail(
        f"{module.scheme_name} at {m} rows: {max(found):.2f} times float32, not {required} ({ATTEMPTS} attempts)"
    )


@pytest.mark.parametrize("m", [1, 16, 128, 512])
def test_int8_is_faster_than_float32(linear: nn.Linear, int8: QuantizedLinear, m: int) -> None:
    required = 5.0
    if native.isa() == "avx2":
        required = INT8_WITH_AVX2[m]
    elif why_no_qlinear():
        pytest.skip(f"no fast int8 path here: {why_no_qlinear()}")
    check(linear, int8, m, required, 0.02)


@pytest.mark.skipif(why_no_int4pack() is not None, reason=f"no fast int4 path here: {why_no_int4pack()}")
@pytest.mark.parametrize("m, required", [(1, 8.0), (16, 1.5), (128, 1.5), (512, 1.5)])
def test_int4_is_faster_than_float32(linear: nn.Linear, int4: QuantizedLinear, m: int, required: float) -> None:
    if native.isa() == "avx2":
        required = INT4_WITH_AVX2[m]
    check(linear, int4, m, required, 0.15)
