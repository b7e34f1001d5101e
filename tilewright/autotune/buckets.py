"""Batches that share a tuned choice: from just above one edge up to the next. The edges are data, and part of a table's
meaning: changing them orphans what was tuned before.
"""

from __future__ import annotations

import bisect

#: Rows of activations. Dense where kernels change families, one binade apart where arithmetic rules.
EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def upper_edge(m: int) -> int:
    """The bucket of ``m`` rows, named by its largest batch, which is the one that is timed; 16384 has no end."""
    place = bisect.bisect_left(EDGES, m)
    return EDGES[place] if place < len(EDGES) else 2 * EDGES[-1]
