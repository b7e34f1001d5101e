"""Small convolutional networks in the shapes that models come in, for the tests of fusion and calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tilewright.convert.network.program import Program


def settled(model: nn.Module, *, spread: float = 0.3) -> nn.Module:
    """``model`` in eval mode, its batch-norms with random statistics and factors that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, spread)
            nn.init.uniform_(module.running_var, 1 - spread, 1 + spread)  # type: ignore[arg-type]
            if module.affine:
                nn.init.uniform_(module.weight, 1 - spread, 1 + spread)
                nn.init.normal_(module.bias, 0, spread)
    return model.eval()


def programs_of(model: nn.Module) -> dict[str, Program]:
    """The programs of ``model`` by the names of their modules."""
    found = ((name, vars(module).get("forward")) for name, module in model.named_modules())
    return {name: program for name, program in found if isinstance(program, Program)}


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Basic(nn.Module):
    """A residual block, its activation used twice and its addition in place."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv_bn(c_in, c_out, 1, stride) if stride != 1 or c_in != c_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class SmallResNet(nn.Module):
    def __init__(self, channels: int = 1, width: int = 16, classes: int = 10, pool: bool = True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.layer1 = nn.Sequential(Basic(width, width), Basic(width, width))
        self.layer2 = nn.Sequential(Basic(width, 2 * width, 2), Basic(2 * width, 2 * width))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, classes)
        self.remark = "kept"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(self.avgpool(x).flatten(1))


class Inverted(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1, activation: Callable[[], nn.Module] = nn.ReLU6):
        super().__init__()
        hidden = 4 * c_in
        self.skip = stride == 1 and c_in == c_out
        expand, depthwise = conv_bn(c_in, hidden, 1), conv_bn(hidden, hidden, 3, stride, hidden)
        self.conv = nn.Sequential(*expand, activation(), *depthwise, activation(), *conv_bn(hidden, c_out, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class SmallMobileNet(nn.Module):
    def __init__(self, channels: int = 1, width: int = 12, classes: int = 10, activation: Any = nn.ReLU6):
        super().__init__()
        blocks = [Inverted(width, width, 1, activation), Inverted(width, 2 * width, 2, activation)]
        blocks += [Inverted(2 * width, 2 * width, 1, activation)]
        self.features = nn.Sequential(*conv_bn(channels, width), activation(), *blocks)
        self.head, self.dropout = nn.Linear(2 * width, classes), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(x).mean((2, 3))))


class SqueezeExcite(nn.Module):
    """A block of an EfficientNet."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.expand, self.depthwise, self.project = (
            conv_bn(width, 3 * width, 1),
            conv_bn(3 * width, 3 * width, 3, 1, 3 * width),
            conv_bn(3 * width, width, 1),
        )
        self.reduce, self.restore = nn.Conv2d(3 * width, 4, 1), nn.Conv2d(4, 3 * width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.depthwise(F.silu(self.expand(x))))
        gate = torch.sigmoid(self.restore(F.silu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.project(y * gate)


class Inception(nn.Module):
    """Branches that are concatenated, with pooling in one, then shuffled channels."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.a, self.b, self.c = conv_bn(width, 6, 1), conv_bn(width, 8), conv_bn(width, 4, 1)
        self.pool, self.last = nn.MaxPool2d(3, 1, 1), conv_bn(18, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x)), F.relu(self.c(self.pool(x)))], 1)
        n, c, h, w = y.size()
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return F.relu(self.last(y))


def source_of(model: nn.Module) -> str:
    """The code that a converted model runs."""
    return vars(model)["forward"].source
