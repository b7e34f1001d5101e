"""The bar every float result is held to (see "Arithmetic" in the design): no worse than twice what plain PyTorch loses.

The plain PyTorch expression in the same dtype and ours are both compared with float64. Ours may err by at most twice as
much, plus one unit in the last place of the exact result, both at the worst element and in root mean square. Nothing
here grows with K.
"""

from __future__ import annotations

import torch

#: Spacing of floats just above 1.
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 0.0}


def ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of ``dtype`` at each float64 value."""
    magnitude = torch.floor(torch.log2(exact.abs().clamp(min=torch.finfo(dtype).tiny)))
    return (torch.exp2(magnitude) * EPS[dtype]).clamp(min=SMALLEST[dtype])


def assert_close_as_plain(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """``actual`` is as good an approximation of ``exact`` (float64) as ``plain`` is, within the bar above.

    All three have one shape; actual and plain have one dtype. Non-finite elements must be non-finite in both.
    """
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    unit = ulp(exact, actual.dtype).cpu()
    finite = torch.isfinite(exact).cpu()
    misplaced = torch.isfinite(actual).cpu() != finite
    assert not misplaced.any(), f"non-finite where it should not be, or the reverse, at {_first(misplaced)}"
    ours = (actual.double().cpu() - exact.cpu()).abs().where(finite, 0.0)
    theirs = (plain.double().cpu() - exact.cpu()).abs().where(finite, 0.0)
    unit = unit.where(finite, 0.0)
    worst = ours > 2 * theirs.amax() + unit
    assert not worst.any(), (
        f"error {ours[worst].amax():.3g} exceeds twice the plain expression's {theirs.amax():.3g} plus one ulp "
        f"at {_first(worst)}"
    )
    rms, plain_rms, unit_rms = (t.square().mean().sqrt().item() for t in (ours, theirs, unit))
    assert rms <= 2 * plain_rms + unit_rms, f"RMS error {rms:.3g}, plain expression {plain_rms:.3g}, ulp {unit_rms:.3g}"


def _first(where: torch.Tensor, count: int = 5) -> list[list[int]]:
    """Coordinates of the first true elements."""
    return where.nonzero()[:count].tolist()
