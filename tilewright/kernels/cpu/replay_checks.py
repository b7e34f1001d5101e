"""Whether a step of a replay gives what the recorded call gave."""

from __future__ import annotations

import torch


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are the same numbers."""
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def is_near(found: torch.Tensor, expected: torch.Tensor, strict: bool) -> bool:
    """Whether two results of one operator on the same inputs are equal but for rounding; strict: of float32 sums in
    another order.
    """
    if not expected.is_floating_point():
        return not expected.numel() or int((found.int() - expected.int()).abs().max()) <= 1
    relative, absolute = (1e-4, 1e-5) if strict else (1e-2, 1e-3)
    a, b = found.double(), expected.double()
    finite = b[b.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, relative, absolute * size, True)
