"""Modules that random networks are made of beside PyTorch's own: blocks whose code is read by itself, or not at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """As in a ResNet, with one activation for all."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.conv2(y)
        y += x
        return self.act(y)


class PreActivated(nn.Module):
    """Writes into a copy of what it is given before its convolution reads it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.short = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        short = self.short(y)
        return self.conv(F.relu(y, inplace=True)) + short


class Picky(nn.Module):
    """Branches on a value, so that nobody can read its code."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            return x
        return F.silu(self.norm(self.conv(x)))


class Counting(nn.Module):
    """Writes state of its own, and grows smaller with it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.conv(x) / self.calls


class FeedForward(nn.Module):
    """Two linear layers, the activation of the first a module, the second with a shortcut."""

    def __init__(self, features: int):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))
