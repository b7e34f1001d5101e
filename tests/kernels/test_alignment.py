"""A view that starts anywhere in its storage: vectorised code must not take it to be aligned."""

from __future__ import annotations

import pytest
import torch

from bench.problems import LINEAR, Shape, make_arguments


def off_by_one(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that starts one element into its storage."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor)


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("m", [1, 24, 100])
def test_misaligned_tensors_give_the_same_result(op: str, m: int) -> None:
    arguments = make_arguments(op, Shape(m, 48, 96, torch.bfloat16, group_size=32, symmetric=False, residual=True))
    run = getattr(torch.ops.tilewright, op)
    expected = run(**arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found = run(**{**arguments, name: off_by_one(value)})
            assert torch.equal(found, expected), f"{name} is misaligned"
