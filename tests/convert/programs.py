"""Random networks whose forward writes in place, has several names and views of one tensor, and keeps state."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 8


class Opaque(nn.Module):
    """Branches on a value, and may write to what it is given or give it back. kind: 0 to 3."""

    def __init__(self, kind: int):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.mean() > 100:
            return x
        if self.kind == 0:
            return self.conv(x)
        if self.kind == 1:
            return x.mul_(0.5)
        return F.relu(self.conv(x)) + x if self.kind == 2 else x


class Writer:
    """Writes one forward. depth: of blocks in blocks that may still come."""

    def __init__(self, seed: int, depth: int = 1, inputs: tuple[str, ...] = ("x",)):
        self.random, self.depth = random.Random(seed), depth
        self.modules: dict[str, nn.Module] = {}
        self.lines: list[str] = []
        self.names = list(inputs)
        self.inputs = inputs

    def name(self) -> str:
        return self.random.choice(self.names[-4:] if self.random.random() < 0.7 else self.names)

    def new(self, expression: str) -> None:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self.names.append(name)

    def module(self, module: nn.Module) -> str:
        name = f"m{len(self.modules)}"
        self.modules[name] = module
        return f"self.{name}"

    def one_of(self, forms: str) -> str:
        """One of the forms, which stand on lines and between bars, with names in place of ``a`` and ``b``."""
        form = self.random.choice(
            [each for line in forms.split("\n") if line.strip() for each in line.strip().split("|")]
        )
        identity = self.module(nn.Identity()) if "{identity}" in form else ""
        return form.format(a=self.name(), b=self.name(), identity=identity)

    def convolution(self) -> None:
        conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=self.random.choice((1, 1, 1, WIDTH)))
        self.new(f"{self.module(conv)}({self.name()})")
        if self.random.random() < 0.5:
            norm = nn.BatchNorm2d(WIDTH)
            nn.init.normal_(norm.running_mean, 0, 0.3)
            self.new(f"{self.module(norm)}({self.names[-1]})")
        if self.random.random() < 0.5:
            self.activation(self.names[-1])

    def activation(self, name: str | None = None) -> None:
        name = name or self.name()
        inplace = self.random.random() < 0.5
        kind = self.random.choice((nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ReLU6))
        form = self.random.randrange(6)
        if form == 0:
            self.new(f"{self.module(kind(inplace=inplace))}({name})")
        elif form == 1:
            self.lines.append(f"{self.module(kind(inplace=True))}({name})")
        elif form == 2:
            self.new(f"F.relu({name}, inplace={inplace})")
        elif form == 3:
            self.lines.append(f"{name} = F.silu({name}, inplace={inplace})")
        elif form == 4:
            self.new(f"{name}.relu_()" if inplace else f"torch.relu({name})")
        else:
            self.new(f"{self.module(nn.Dropout(0.5, inplace=inplace))}({name})")

    def addition(self) -> None:
        self.new(self.one_of("{a} + {b}|torch.add({a}, {b})|{a}.add({b}, alpha=0.5)|{a} * 0.5 - {b}"))

    def write(self) -> None:
        forms = """
            {a} += {b}|{a}.add_({b})|{a} *= 0.5|{a} -= 0.1 * {b}|{a}.mul_(0.9)|{a}.clamp_(-1, 1)
            torch.mul({a}, 0.7, out={a})|F.relu_({a})|{a}.copy_({b})|torch.sigmoid_({a})
        """
        self.lines.append(self.one_of(forms))

    def write_part(self) -> None:
        forms = """
            {a}[:, 0] = 0.5|{a}[:, :4] += 0.1|{a}[0].mul_(0.5)|{a}.view(-1).add_(0.1)|{a}.flatten(2).relu_()
        """
        self.lines.append(self.one_of(forms))

    def alias(self) -> None:
        forms = """
            {a}|{a}|{a}.view({a}.shape)|{a}[:]|{a}.detach()|{a}.contiguous()|{a}.float()|{a}.clone()|{identity}({a})
            {a}.flatten(1).view({a}.size())|{a}.permute(0, 1, 3, 2).permute(0, 1, 3, 2)
            torch.cat({a}.chunk(2, 1), 1)|{a}.reshape({a}.shape[0], -1).reshape({a}.shape)
        """
        self.new(self.one_of(forms))

    def cat(self) -> None:
        conv = self.module(nn.Conv2d(2 * WIDTH, WIDTH, 1))
        self.new(f"{conv}(torch.cat([{self.name()}, {self.name()}], 1))")

    def question(self) -> None:
        a = self.name()
        self.lines += [f"if {a}.shape[1] != {WIDTH}:", "    raise ValueError('channels')"]

    def state(self) -> None:
        a = self.name()
        forms: tuple[tuple[str, ...], ...] = (
            ("self.count += 1", f"{a} = {a} * self.count"),
            ("self.total += 1", f"{a} = {a} * self.total"),
            (f"self.total.mul_(0.9).add_({a}.mean())",),
            (f"self.history.append({a}.shape)", f"{a} = {a} * len(self.history)"),
            (f"self.last = {a}",),
            ("self.total = self.total + 1", f"{a} = {a} - self.total"),
            ("self.options['n'] = self.options['n'] + 1", f"{a} = {a} + self.options['n']"),
        )
        self.lines += self.random.choice(forms)

    def opaque(self) -> None:
        self.new(f"{self.module(Opaque(self.random.randrange(4)))}({self.name()})")

    def block(self) -> None:
        if self.depth:
            inner = network(self.random.randrange(10**9), self.depth - 1, self.random.choice((("x",), ("x", "y"))), 6)
            arguments = ", ".join(self.name() for _ in inner.inputs)
            self.new(f"{self.module(inner)}({arguments})")

    def write_forward(self, steps: int) -> str:
        weights = {self.convolution: 8, self.activation: 5, self.addition: 4, self.write: 4, self.alias: 4, self.cat: 1}
        weights |= {self.write_part: 0.7, self.question: 0.5, self.state: 0.25, self.opaque: 0.4, self.block: 1.5}
        self.convolution()
        for _ in range(steps):
            self.random.choices(list(weights), list(weights.values()))[0]()
        result = self.name() if self.random.random() < 0.7 else f"{self.name()} + {self.name()}"
        body = "\n    ".join([*self.lines, f"return {result}"])
        return f"def forward(self, {', '.join(self.inputs)}):\n    {body}\n"


def network(seed: int, depth: int = 1, inputs: tuple[str, ...] = ("x",), steps: int = 12) -> Any:
    """A module with a forward of its own making, in eval mode. ``source``: its code."""
    writer = Writer(seed, depth, inputs)
    source = writer.write_forward(steps)
    space: dict[str, Any] = {"torch": torch, "F": F}
    exec(source, space)

    def start(self: Any) -> None:
        nn.Module.__init__(self)
        self.count, self.history, self.last, self.options = 0, [], None, {"n": 0}
        self.register_buffer("total", torch.zeros(()))

    space["forward"].__module__ = start.__module__
    kind = type(f"Random{seed}", (nn.Module,), {"__init__": start, "forward": space["forward"], "__module__": __name__})
    model = kind()
    for name, module in writer.modules.items():
        setattr(model, name, module)
    model.inputs, model.source = inputs, source
    return model.eval()
