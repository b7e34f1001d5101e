"""Which shapes 2:4 pays for on a GPU: a pure function of the problem, whose words reach the report.

What an H200 showed, at 4096 x 4096 and 14336 x 4096 (``bench/results/sparse24_nvidia_h200.csv``), against a dense layer
of the same dtype:

* ``mma.sp`` fed from fragment order is ahead for one row of bf16 (1.3 and 1.5 times as fast), on a level at 8 rows, and
  behind at 16. With int8 it is ahead of dense int8 by a tenth up to 16 rows, and far behind at 64.
* Unpacking in registers was never clearly ahead, and with int4 always behind. Other chips, not measured, get it by
  arithmetic: the weight costs fewer bytes and as many multiplications as dense, and small tiles reach a third of the
  tensor cores' speed, so it should pay for up to 64 rows.
* A weight that stays in the L2 cache between calls is not read from memory, and launching costs more than the product.

The vendor's sparse product was not there; it should pay from about 512 rows on, and only for large weights.
"""

from __future__ import annotations

from tilewright.kernels.dispatch.problem import Problem

#: Rows up to which a weight unpacked in registers should be worth it, and the compute capability where it is not.
UNPACKED_ROWS = 64
NOT_UNPACKED = (9, 0)
#: Rows up to which ``mma.sp`` fed from fragment order is worth it.
FRAGMENT_ROWS = {"sparse24_linear": 8, "sparse24_int8_linear": 16}
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
    measured = problem.capability == NOT_UNPACKED
    most = FRAGMENT_ROWS.get(problem.op, 0) if measured else UNPACKED_ROWS
    if problem.m <= most:
        return None
    if measured:
        batches = f"beyond {most} rows" if most else "for every batch"
        return f"{KEPT_DENSE} ({batches} dense was faster on an H200)"
    return f"{KEPT_DENSE} (beyond {most} rows multiplying takes longer than reading the weight)"


def why_not_unpacked(problem: Problem) -> str | None:
    """Why unpacking in registers does not pay, or None."""
    reason = why_kept_dense(problem)
    if reason is None and problem.capability == NOT_UNPACKED:
        return "dense was as fast on an H200, or faster, for every batch"
    return reason


def why_not_fragments(problem: Problem) -> str | None:
    """Why ``mma.sp`` on fragment order does not pay, or None."""
    reason, most = why_kept_dense(problem), FRAGMENT_ROWS[problem.op]
    if reason is None and problem.m > most:
        return (
            f"behind dense beyond {most} rows on an H200: for more than it holds in registers, it reads weights again"
        )
    return reason


def why_not_library(problem: Problem) -> str | None:
    """Why the vendor's sparse product does not pay, or None."""
    if problem.m < LIBRARY_ROWS:
        return why_kept_dense(problem) or f"libraries are slower than dense below {LIBRARY_ROWS} rows"
    if min(problem.n, problem.k) < LIBRARY_FEATURES:
        return f"{KEPT_DENSE} (libraries gain nothing below {LIBRARY_FEATURES} features)"
    return None
