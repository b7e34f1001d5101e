"""The arithmetic of the GPU benchmark, which needs no GPU."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import OPS, Ceilings, assert_near_definition, bytes_moved, main, slug
from bench.problems import Shape, make_arguments, reference


def test_the_longer_of_bytes_and_operations_bounds_the_time() -> None:
    ceilings = Ceilings(bytes=1e12, float_ops=1e14, int_ops=2e14)
    assert ceilings.shortest(moved=10**12, operations=10**12, integer=False) == 1.0
    assert ceilings.shortest(moved=1, operations=10**14, integer=False) == 1.0
    assert ceilings.shortest(moved=1, operations=10**14, integer=True) == 0.5


def test_bytes_are_those_of_the_arguments_and_the_result() -> None:
    arguments = make_arguments("int8_linear_quantized", Shape(3, 5, 16, bias=False))
    assert bytes_moved(arguments, n=5, out_bytes=2) == 3 * 16 + 3 * 4 + 5 * 16 + 5 * 4 + 3 * 5 * 2


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [1, 40])
def test_a_wrong_corner_stops_the_benchmark(op: str, m: int) -> None:
    arguments = make_arguments(op, Shape(m, 300, 128, group_size=32, bias=False))
    found = reference(op)(**arguments)
    assert_near_definition(op, arguments, found)
    found[-1, -1] += 10
    with pytest.raises(ValueError, match=f"{op}: RMS error"):
        assert_near_definition(op, arguments, found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "no GPU here" in capsys.readouterr().out


def test_a_device_name_becomes_a_file_name() -> None:
    assert slug("NVIDIA H200") == "nvidia_h200"
