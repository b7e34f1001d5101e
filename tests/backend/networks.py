"""Small networks for the tests of the backend, and how they are compiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.backend import GraphReport, compile_report, tilewright


def compiled(model: Any, inner: str = "aot_eager", dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(
        model, backend=tilewright, fullgraph=True, dynamic=dynamic, options={"inner": inner, **options}
    )


def last() -> GraphReport:
    return compile_report()[-1]


def settled(network: nn.Module) -> nn.Module:
    """In eval mode, batch-norms with statistics that are not those of an untrained network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


class Block(nn.Module):
    """conv-bn-relu, conv-bn + shortcut, relu in place, then a view, as image networks end."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding="same", groups=2)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y).view(x.shape[0], -1)


class Feed(nn.Module):
    """norm, two linear layers with GELU between, residual."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))
