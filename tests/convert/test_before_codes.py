"""Files of before int8 codes were called ``weight_codes``, and float ones ``weight_ohwi``: both were ``weight``.

``before_codes/`` was written at revision ac31bf4 from the network below: by ``save_model``, by ``torch.save`` of the
state dict, and an input with what came out of it.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tilewright as tw
from tilewright.convert import CheckpointError

FOLDER = Path(__file__).parent / "before_codes"


class Network(nn.Module):
    """One layer of each class that held a ``weight``, and one that did not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)  # which is as large OHWI as it is OIHW
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.wide = nn.Linear(4, 16)
        self.static = nn.Linear(16, 16)
        self.packed = nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.norm(self.stem(x)).relu())
        return self.last(self.packed(self.static(self.wide(x.mean((2, 3)))).relu()))


@pytest.fixture
def example() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "example.safetensors")


def old_state() -> dict[str, torch.Tensor]:
    return torch.load(FOLDER / "state.pt", weights_only=True)


def check(model: nn.Module, example: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(example["x"]), example["y"], rtol=1e-2, atol=1e-3)


def test_a_folder_loads(example: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = tw.load_model(FOLDER, Network)
    check(model, example)
    assert {"stem.weight_ohwi", "conv.weight_codes", "wide.weight_codes"} <= model.state_dict().keys()
    assert not {name for name in model.state_dict() if name.endswith(".weight")}
    tw.save_model(model, tmp_path / "again")
    assert "stem.weight_ohwi" in json.loads((tmp_path / "again" / "tilewright.json").read_text())["tensors"]
    check(tw.load_model(tmp_path / "again", Network), example)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_state_dict_loads_strictly(example: dict[str, torch.Tensor], assign: bool) -> None:
    model, state = tw.load_model(FOLDER, Network), old_state()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.zeros_like(tensor)
    given = dict(state)
    model.load_state_dict(state, strict=True, assign=assign)
    assert state.keys() == given.keys(), "the caller's dict is his"
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    check(model, example)


def test_a_pickled_model_of_before_wakes_up(example: dict[str, torch.Tensor]) -> None:
    """Its modules hold what they held then."""
    model = tw.load_model(FOLDER, Network)
    for module in model.modules():
        if hasattr(module, "renamed"):
            state = copy.copy(vars(module))
            for old, new in module.renamed().items():
                for table in ("_buffers", "_parameters"):
                    state[table] = {old if name == new else name: value for name, value in state[table].items()}
            module.__setstate__(state)
    check(model, example)
    assert "wide.weight_codes" in model.state_dict()


def test_a_file_that_has_both_names_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    path = tmp_path / "model" / "tilewright.json"
    data = json.loads(path.read_text())
    data["tensors"]["wide.weight_codes"] = data["tensors"]["wide.weight"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"wide\.weight"):
        tw.load_model(tmp_path / "model", Network)
    model = tw.load_model(FOLDER, Network)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*wide\.weight"):
        model.load_state_dict({**model.state_dict(), "wide.weight": model.wide.weight_codes})
