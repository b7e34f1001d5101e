"""Networks of timm and torchvision under the newest PyTorch: `make zoo` runs this in an environment of its own."""

from __future__ import annotations

import pytest

from tests.zoo.known_networks import EXPECTED, FLOORS

pytest.importorskip("timm", reason="timm is not installed: `make zoo` makes an environment that has it")
pytest.importorskip("torchvision", reason="torchvision is not installed: `make zoo` makes an environment that has it")

from tests.zoo.networks import NETWORKS, case, ways


@pytest.mark.slow
@pytest.mark.parametrize("name, recipe", [(name, recipe) for name in NETWORKS for recipe in ways(name)])
def test_network(name: str, recipe: str) -> None:
    floor = FLOORS.get((name, recipe), FLOORS["*", recipe])
    found, expected = case(name, recipe, floor).failures(), EXPECTED.get((name, recipe), {})
    new = {step: told for step, told in found.items() if step not in expected}
    assert not new, "\n".join(f"{step}: {told}" for step, told in new.items())
    assert not expected.keys() - found.keys(), "some of what is known to fail works now: take it out of the table"
