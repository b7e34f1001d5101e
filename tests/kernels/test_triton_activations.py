"""An activation that the operators have gained and the Triton kernels lack is declined in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton publishes wheels for Linux alone")

from bench.catalogue import FAMILIES, Family
from bench.problems import Shape
from tilewright.aot.targets import TARGETS
from tilewright.kernels.activation import ACTIVATIONS, TRITON_ACTIVATIONS, check_activation
from tilewright.kernels.dispatch.problem import Problem

LINEAR = [family for family in FAMILIES if "linear" in family.op]


def problem_of(family: Family, activation: str) -> Problem:
    m = 600 if "dequantize" in family.name else 8
    shape = Shape(m, 512, 512, group_size=128 if "int4" in family.op else None)
    return replace(family.problem(shape, TARGETS["sm_90"]), activation=activation)


@pytest.mark.parametrize("family", LINEAR, ids=lambda family: family.name)
def test_an_activation_the_kernels_lack_is_declined(family: Family) -> None:
    assert family.why_not(problem_of(family, "cubic")) == "does not have the activation cubic"


@pytest.mark.parametrize("activation", [name for name in TRITON_ACTIVATIONS if name in ACTIVATIONS])
@pytest.mark.parametrize("family", LINEAR, ids=lambda family: family.name)
def test_those_they_have_are_taken(family: Family, activation: str) -> None:
    check_activation(activation)
    assert family.why_not(problem_of(family, activation)) is None
