"""The table of conversion times: its networks, and how its processes are started."""

from __future__ import annotations

import pytest
import torch

from bench import picture_networks
from bench.conversion_worker import ROOT
from bench.tables.conversion import Side, revision


@pytest.mark.parametrize("name, weights, pixels", [("resnet50", 25_557_032, 64), ("densenet121", 7_978_856, 64)])
def test_networks_have_the_weights_of_those_they_are_called_after(name: str, weights: int, pixels: int) -> None:
    network = getattr(picture_networks, name)().eval()
    assert sum(each.numel() for each in network.parameters()) == weights
    with torch.no_grad():
        assert network(torch.randn(2, 3, pixels, pixels)).shape == (2, 1000)


def test_a_process_is_asked_for_the_model_that_was_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        Side(ROOT, "abacus, 8 beads")
    assert "KeyError: 'abacus, 8 beads'" in capfd.readouterr().err


def test_a_revision_is_called_what_it_is_called() -> None:
    assert revision("HEAD~1") == "HEAD~1"
