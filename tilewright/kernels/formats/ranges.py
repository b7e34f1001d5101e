"""Which range of values a quantiser spends its levels on.

``minmax`` covers every value. ``mse`` shrinks the range step by step and keeps, for each group, the shrinkage with the
least squared error: a few clipped outliers often cost less than coarser steps for all the rest. Errors can be weighted
by how much each input channel matters: with the mean square of the activations, the sum is the expected squared error
of the output when channels are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

RANGE_SEARCHES = ("minmax", "mse")
#: Fractions of the full range that ``mse`` tries, widest first, so that a tie keeps the wider range.
SHRINKAGES = tuple(1 - 0.02 * i for i in range(26))


def check_range_search(name: str) -> None:
    """Raise ValueError unless ``name`` is one of ``RANGE_SEARCHES``."""
    if name not in RANGE_SEARCHES:
        raise ValueError(f"range search {name!r} is unknown; the known ones are {', '.join(RANGE_SEARCHES)}")


def search_shrinkage(
    weight: torch.Tensor,
    dequantized: Callable[[float], torch.Tensor],
    name: str,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Best fraction of the range for each group.

    weight: float [..., size of a group]. dequantized: maps a fraction to the weight as it would come back. importance:
    weights of the squared errors, non-negative, broadcast against ``weight``. Returns float32 [...].
    """
    check_range_search(name)
    best = weight.new_ones(weight.shape[:-1])
    if name == "minmax":
        return best
    least = torch.full_like(best, torch.inf)
    for fraction in SHRINKAGES:
        error = (dequantized(fraction) - weight).square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, fraction, best)
    return best


def all_finite(values: torch.Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf.

    ``aminmax`` passes NaN on and reads the values once; ``isfinite(...).all()`` takes nine times as long on a CPU.
    """
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def row_blocks(weight: torch.Tensor, elements: int = 1 << 20) -> Iterator[torch.Tensor]:
    """``weight`` [N, K] in blocks of rows that bound the memory a search needs; at least one block, even if it is
    empty.
    """
    yield from weight.split(max(1, elements // max(1, weight.shape[1])))
