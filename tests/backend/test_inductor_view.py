"""Why operators are opaque: what the docs say of the code that Inductor generates for a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
if not torch.__version__.startswith("2.13"):
    pytest.skip("Inductor's insides, which are looked at here, are those of PyTorch 2.13", allow_module_level=True)

from bench.tables import inductor_view


@pytest.mark.parametrize(
    "form, launches, pointwise, operators, buffers",
    [("seen", 4, 2, 0, 5), ("opaque", 2, 2, 1, 1), ("rewritten", 1, 1, 1, 1)],
)
def test_the_table_of_launches_in_the_docs(
    form: str, launches: int, pointwise: int, operators: int, buffers: int
) -> None:
    found = inductor_view.counts(inductor_view.generated(getattr(inductor_view, form)))
    assert found == {"launches": launches, "pointwise": pointwise, "operators": operators, "buffers": buffers}
