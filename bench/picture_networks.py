"""ResNet-50 and DenseNet-121 as torchvision defines them, of PyTorch alone: torchvision is rarely there in the version
that a new PyTorch takes. This module imports nothing of the project, as it runs beside any revision of it.

ResNet: He et al. 2015, with the stride in the 3 x 3 convolution. DenseNet: Huang et al. 2016, table 1.
"""

from __future__ import annotations

import torch
from torch import nn


class Bottleneck(nn.Module):
    """relu(x + conv1x1(conv3x3(conv1x1(x)))), x projected where its shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        # A quarter of the shortcut: with random weights alone each block enlarges the rounding of those before it.
        nn.init.constant_(self.bn3.weight, 0.25)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] -> [N, 4 width, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        return self.relu(x)


class DenseLayer(nn.Module):
    """``growth`` new channels of all features so far, as a list of tensors."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Each [N, C, H, W] -> [N, growth, H, W]."""
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    """Layers each of which reads the outputs of all before it."""

    def __init__(self, layers: int, channels: int, growth: int) -> None:
        super().__init__()
        for index in range(layers):
            self[f"denselayer{index + 1}"] = DenseLayer(channels + index * growth, growth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C + layers growth, H, W]."""
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def resnet50(classes: int = 1000) -> nn.Module:
    """[N, 3, H, W] -> [N, classes], with random weights."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks, channels = list[nn.Module](), 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            blocks.append(Bottleneck(channels, 64 << stage, 2 if stage and not index else 1))
            channels = 256 << stage
    return _seeing([*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)])


def densenet121(classes: int = 1000, growth: int = 32) -> nn.Module:
    """[N, 3, H, W] -> [N, classes], with random weights."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    parts, channels = list[nn.Module](stem), 64
    for index, layers in enumerate((6, 12, 24, 16)):
        if index:
            halved = nn.Conv2d(channels, channels // 2, 1, bias=False)
            parts += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), halved, nn.AvgPool2d(2, 2)]
            channels //= 2
        parts.append(DenseBlock(layers, channels, growth))
        channels += layers * growth
    last = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return _seeing([*parts, *last, nn.Linear(channels, classes)])


def _seeing(parts: list[nn.Module]) -> nn.Module:
    """One after the other, their convolutions as large as their inputs ask for."""
    network = nn.Sequential(*parts)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
    return network
