"""What convolutions were seen to read and return is held where there is room, and no result depends on that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.convert.networks import SmallResNet, settled
from tilewright import convert_model, report
from tilewright.convert.calibrate import Memory
from tilewright.convert.graph import Region
from tilewright.convert.network.seen import SeenCall


class Writes(nn.Module):
    """Changes what a convolution has read before it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (1, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = self.second(x)
        x.mul_(2.0)
        return self.third(x + y)


@pytest.mark.parametrize("kind", [SmallResNet, Writes])
def test_a_network_runs_again_only_where_what_it_showed_was_not_held(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, images = settled(kind()), [torch.randn(2, 1, 12, 12) for _ in range(5)]
    interpret, runs, found = Region.interpret, list[int](), list[tuple[dict[str, Any], list[float | None]]]()

    def counted(region: Region, *rest: Any) -> Any:
        runs.append(1)
        return interpret(region, *rest)

    monkeypatch.setattr(Region, "interpret", counted)
    for limit, again in [(2**30, 0 if kind is SmallResNet else 4), (10 * images[0].nbytes, 4)]:
        runs.clear()
        converted = convert_model(model, "int8", calibration_data=images, calibration_memory=limit)
        assert len(runs) == 5 + again  # eight images are measured on, of which four calls bring two each
        found.append((converted.state_dict(), [layer.output_error for layer in report(converted).layers]))
    (state, errors), (other, other_errors) = found
    assert errors == other_errors and all(torch.equal(state[name], other[name]) for name in state)


def test_what_is_held_is_counted_once_and_given_back() -> None:
    memory, x, y = Memory(1000), torch.zeros(50), torch.zeros(100)
    seen = SeenCall(memory)
    seen.add("a", (x, None, 2), y)
    seen.add("b", (y, x[:10], "relu"), x.view(5, 10))
    assert memory.held == 600 and seen.intact()
    assert [layer for layer, _, _ in seen.shown()] == ["a", "b"]
    assert memory.held == 0 and memory.most == 600


def test_what_finds_no_room_is_let_go_of() -> None:
    memory = Memory(500)
    seen = SeenCall(memory)
    seen.add("a", (torch.zeros(50),), torch.zeros(50))
    assert memory.held == 400
    seen.add("b", (torch.zeros(50),), torch.zeros(50))
    assert memory.held == 0 and not seen.intact()
    seen.add("c", (), torch.zeros(1))  # a part would not do
    assert memory.held == 0 and memory.most == 400 and not list(seen.shown())


def test_what_somebody_wrote_to_is_not_what_was_seen() -> None:
    x, seen = torch.zeros(4), SeenCall(Memory())
    seen.add("a", (x,), torch.zeros(4))
    assert seen.intact()
    x[1] = 1.0
    assert not seen.intact()
    with torch.inference_mode():  # where nobody counts what is written
        seen = SeenCall(Memory())
        seen.add("a", (torch.zeros(4),), torch.zeros(4))
        assert not seen.intact()


def test_inputs_come_before_what_calls_show() -> None:
    memory, kept = Memory(1000), list[Any]()
    assert memory.keep(kept, torch.zeros(100)) and memory.take(kept, 500)
    assert not memory.keep(kept, torch.zeros(100))
    memory = Memory(1000)
    seen = SeenCall(memory)
    assert memory.keep(kept := [], torch.zeros(100))
    seen.add("a", (), torch.zeros(125))
    assert not memory.keep(kept, torch.zeros(100)) and memory.held == 900
    seen.release()
    assert memory.keep(kept, torch.zeros(100)) and memory.held == 800
