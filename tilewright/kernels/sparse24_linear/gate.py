"""Which shapes 2:4 pays for on a GPU: a pure function of the problem, whose words reach the report.

Arithmetic for an H200 (4.3 TB/s copied, 790 bf16 and about 1,500 int8 tera-operations a second), not measured:

* Unpacked in registers, the weight costs fewer bytes and as many multiplications as dense. Dense bf16 turns from bytes
  to multiplications at about 184 rows; small tiles reach a third of the tensor cores' speed, so the limit is 64.
* ``mma.sp`` halves the multiplications too, but a warp that holds all its operands in registers has room for 16 rows;
  more would read the weight again.
* The vendor's sparse product pays from about 512 rows on, and only for large weights.
* A weight that stays in the L2 cache between calls is not read from memory, and launching costs more than the product.
"""

from __future__ import annotations

from tilewright.kernels.problem import Problem

#: Rows up to which a weight unpacked in registers is worth it.
UNPACKED_ROWS = 64
#: Rows up to which ``mma.sp`` fed from fragment order is.
FRAGMENT_ROWS = 16
#: Rows from which the vendor's sparse product is, and the least output and input features.
LIBRARY_ROWS = 512
LIBRARY_FEATURES = 1024
#: Weights below which launching a kernel takes longer than multiplying.
SMALLEST = 1 << 20

KEPT_DENSE = "kept dense: 2:4 does not pay for this shape"


def why_kept_dense(problem: Problem) -> str | None:
    """Why no kernel for 2:4 weights pays for this problem, or None. The vendor's product is left aside."""
    if problem.n * problem.k < SMALLEST:
        return f"{KEPT_DENSE} ({problem.n} x {problem.k} weights are read as fast as a kernel is launched)"
    if problem.m > UNPACKED_ROWS:
        return f"{KEPT_DENSE} (beyond {UNPACKED_ROWS} rows multiplying takes longer than reading the weight)"
    return None


def why_not_unpacked(problem: Problem) -> str | None:
    """Why unpacking in registers does not pay, or None."""
    return why_kept_dense(problem)


def why_not_fragments(problem: Problem) -> str | None:
    """Why ``mma.sp`` on fragment order does not pay, or None."""
    reason = why_kept_dense(problem)
    if reason is None and problem.m > FRAGMENT_ROWS:
        return f"its registers hold {FRAGMENT_ROWS} rows, and for more it would read the weight again"
    return reason


def why_not_library(problem: Problem) -> str | None:
    """Why the vendor's sparse product does not pay, or None."""
    if problem.m < LIBRARY_ROWS:
        return why_kept_dense(problem) or f"libraries are slower than dense below {LIBRARY_ROWS} rows"
    if min(problem.n, problem.k) < LIBRARY_FEATURES:
        return f"{KEPT_DENSE} (libraries gain nothing below {LIBRARY_FEATURES} features)"
    return None
