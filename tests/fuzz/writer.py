"""What random networks are made of: each part adds lines of code to a network that is being written.

A part is given the name of a value to go on from, another value, and a number that chooses among its variants. It
returns False where it does not fit. Names of parts that PyTorch programs get wrong easily stand in ``HAZARDS`` with
the hazard, so that a run can leave them out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from tests.fuzz import blocks

Part = Callable[["Writer", str, str, int], bool]
PARTS: dict[str, Part] = {}
HAZARDS: dict[str, str] = {}


class Writer:
    """A network that is being written: its lines run as they are added, which tells the shapes."""

    def __init__(self, x: torch.Tensor):
        self.module = nn.Module().eval()
        self.init: list[str] = []
        self.lines: list[str] = []
        self.scope: dict[str, object] = {
            "self": self.module,
            "x": x,
            "torch": torch,
            "nn": nn,
            "F": nn.functional,
            "blocks": blocks,
        }
        self.values = ["x"]
        self.layers: list[tuple[str, str]] = []  # the name and what it takes: "conv2d of 8", "linear of 16"

    def value(self, name: str) -> torch.Tensor:
        found = self.scope[name]
        assert isinstance(found, torch.Tensor)
        return found

    def shape(self, name: str) -> torch.Size:
        return self.value(name).shape

    def unread(self) -> list[str]:
        """Values that no later line reads."""
        words = [set(re.findall(r"\w+", line.partition(" = ")[2] or line)) for line in self.lines]
        return [name for name in self.values[1:] if not any(name in line for line in words)] or self.values[-1:]

    def layer(self, code: str, takes: str = "") -> str:
        """A submodule, parameter or buffer made by ``code``; its name."""
        name = f"self.m{len(self.init)}"
        self.start(f"{name} = {code}")
        if takes:
            self.layers.append((name, takes))
        return name

    def buffer(self, code: str) -> str:
        name = f"b{len(self.init)}"
        self.start(f'self.register_buffer("{name}", {code})')
        return f"self.{name}"

    def attribute(self, code: str) -> str:
        name = f"self.a{len(self.init)}"
        self.start(f"{name} = {code}")
        return name

    def weighted(self, takes: str) -> list[str]:
        """Layers that take such values and hold a weight themselves."""
        return [name for name, each in self.layers if each == takes and hasattr(eval(name, self.scope), "weight")]

    def start(self, line: str) -> None:
        """A line of ``__init__``."""
        exec(line, self.scope)
        self.module.eval()
        self.init.append(line)

    def new(self, code: str) -> bool:
        """A new value."""
        name = f"v{len(self.lines)}"
        self.run(f"{name} = {code}")
        self.values.append(name)
        return True

    def several(self, code: str, count: int) -> bool:
        names = [f"v{len(self.lines)}{letter}" for letter in "abcd"[:count]]
        self.run(f"{', '.join(names)} = {code}")
        self.values += names
        return True

    def run(self, line: str) -> bool:
        """A line of ``forward``; none where PyTorch refuses it, as a sum into a tensor of one of its own views."""
        try:
            with torch.no_grad():
                exec(line, self.scope)
        except RuntimeError:
            return False
        self.lines.append(line)
        return True


def part(weight: int = 1, hazard: str = "") -> Callable[[Part], Part]:
    """Register a part; the more weight, the likelier it is drawn."""

    def register(function: Part) -> Part:
        for number in range(weight):
            name = function.__name__ + "'" * number
            PARTS[name] = function
            if hazard:
                HAZARDS[name] = hazard
        return function

    return register


def channels(w: Writer, v: str) -> int:
    return w.shape(v)[1]


def is_image(w: Writer, v: str) -> bool:
    return w.value(v).dim() == 4 and min(w.shape(v)[2:]) > 0


def is_sequence(w: Writer, v: str) -> bool:
    return w.value(v).dim() == 3
