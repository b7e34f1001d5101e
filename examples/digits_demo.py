"""Train two small convolutional networks on scanned digits, convert them, and show what that gains and costs.

The digits are the 1797 images of 8 x 8 pixels that scikit-learn ships, so nothing is fetched. A residual network and a
network of depthwise convolutions are trained on 1000 of them for a few seconds; then each is fused (``"fuse"``:
batch-norm, addition and activation inside the convolutions) and quantised (``"int8"``, calibrated on 256 training
images). Accuracy is measured on the other 797 images, latency with the images enlarged, size as what is stored. Run it
with ``make demo``, or::

    python examples/digits_demo.py --check --json figures.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tilewright as tw
from tilewright.autotune.clock import CpuClock

EPOCHS = 8
TRAINED_ON = 1000
CALIBRATED_ON = 256
#: Images are enlarged to this many pixels a side for timing: at 8 x 8 nothing takes any time.
TIMED_SIZE = 32
ROUNDS, RUNS_IN_A_ROW, WARM_UP_RUNS = 5, 10, 4
MOST_LOST = 0.5  # points of accuracy


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a skip connection."""

    def __init__(self, width: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        plain = stride == 1 and width == out
        self.skip = nn.Identity() if plain else nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class Inverted(nn.Module):
    """Expand, convolve each channel by itself, project; a skip connection where shapes allow one."""

    def __init__(self, width: int, out: int, stride: int = 1):
        super().__init__()
        hidden = 4 * width
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.keeps_shape = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.keeps_shape else self.layers(x)


def network(block: Callable[..., nn.Module], width: int) -> nn.Sequential:
    """A stem, four blocks of which one halves the image, and a classifier."""
    stem = (nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = (block(width, width), block(width, width), block(width, 2 * width, 2), block(2 * width, 2 * width))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "small ResNet": lambda: network(Residual, 32),
    "small MobileNet": lambda: network(Inverted, 24),
}


@dataclass
class Figures:
    """What was measured of one variant of a network. accuracy: in per cent."""

    network: str
    name: str
    accuracy: float
    model_bytes: int
    latency_ms: dict[int, float] = field(default_factory=dict)  # batch size -> median


@dataclass(frozen=True)
class Goal:
    """One promise, the figure that decides it, and the verdict."""

    promise: str
    measured: str
    met: bool


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, 8, 8]`` in 0..1 and their labels, in a fixed random order."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = EPOCHS) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent of the images whose label the model finds."""
    return 100 * (model(x).argmax(dim=1) == y).float().mean().item()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in a model's state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@torch.no_grad()
def time_variants(variants: Mapping[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Median milliseconds of one call of each. The variants take turns, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, model in variants.items():
            block = CpuClock().seconds(lambda model=model: model(x), WARM_UP_RUNS + RUNS_IN_A_ROW)
            seconds[name] += block[WARM_UP_RUNS:]
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def reloads(model: nn.Module, build: Callable[[], nn.Module], x: Tensor) -> bool:
    """Whether the model, saved and loaded again, gives the very same logits."""
    with tempfile.TemporaryDirectory() as folder:
        tw.save_model(model, folder)
        loaded = tw.load_model(folder, build).eval()
        return torch.equal(loaded(x), model(x))


def measure(name: str, build: Callable[[], nn.Module], seed: int = 0) -> tuple[list[Figures], list[Goal]]:
    """Train one network, convert it, and compare the variants."""
    torch.manual_seed(seed)
    x, y = digits()
    original = train(build(), x[:TRAINED_ON], y[:TRAINED_ON])
    fused = tw.convert_model(original, "fuse", progress=False)
    int8 = tw.convert_model(original, "int8", calibration_data=x[:CALIBRATED_ON].split(64), progress=False)
    reloaded = reloads(int8, build, x[TRAINED_ON:])
    variants = {"fp32": original, "fused": fused, "int8": int8}
    test_x, test_y = x[TRAINED_ON:], y[TRAINED_ON:]
    figures = [Figures(name, v, accuracy(m, test_x, test_y), stored_bytes(m)) for v, m in variants.items()]
    for batch in (1, 32):
        large = F.interpolate(test_x[:batch], size=TIMED_SIZE)
        for figure, latency in zip(figures, time_variants(variants, large).values(), strict=True):
            figure.latency_ms[batch] = latency
    return figures, goals(figures, reloaded)


def goals(figures: Sequence[Figures], reloaded: bool) -> list[Goal]:
    """What the demo promises of one network, checked against what it measured."""
    fp32, fused, int8 = figures
    name, lost = fp32.network, fp32.accuracy - int8.accuracy
    ratio = int8.model_bytes / fp32.model_bytes
    same = "equal" if reloaded else "DIFFERENT"
    return [
        Goal(f"{name}, fused: the same accuracy", f"{fused.accuracy:.2f} %", fused.accuracy == fp32.accuracy),
        Goal(f"{name}, int8: at most {MOST_LOST} points lost", f"{lost:.2f} points", lost <= MOST_LOST),
        Goal(f"{name}, int8: below 0.4x of the size", f"{ratio:.3f}x", ratio < 0.4),
        Goal(f"{name}, int8: saved and loaded again, the same logits bit for bit", same, reloaded),
    ]


def figures_table(figures: Sequence[Figures]) -> Table:
    """One row for each variant of each network."""
    table = Table(title="Digits: convolutional networks", title_justify="left")
    for title in ("", "variant", "accuracy", "size, kB", "batch 1, ms", "batch 32, ms"):
        table.add_column(title, justify="left" if title in ("", "variant") else "right")
    for figure in figures:
        reference = next(each for each in figures if each.network == figure.network)
        times = [
            f"{latency:.2f} {reference.latency_ms[batch] / latency:.1f}x"
            for batch, latency in figure.latency_ms.items()
        ]
        first = figure is reference
        row = (figure.network if first else "", figure.name, f"{figure.accuracy:.2f} %")
        table.add_row(*row, f"{figure.model_bytes / 1e3:.1f}", *times, end_section=figure.name == "int8")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with the goals; exit with status 1 when one is missed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args(arguments)
    console = Console()
    figures: list[Figures] = []
    verdicts: list[Goal] = []
    for name, build in NETWORKS.items():
        with console.status(f"training, converting and timing the {name}"):
            measured, promised = measure(name, build)
        figures += measured
        verdicts += promised
    console.print(figures_table(figures))
    console.print(
        f"797 test images; timed at {TIMED_SIZE} x {TIMED_SIZE} pixels, medians, speed-up over fp32 eager; "
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads.",
        soft_wrap=True,
    )
    for goal in verdicts if options.check else ():
        word = "[green]met[/]" if goal.met else "[red]MISSED[/]"
        console.print(f"{word}: {goal.promise}: {goal.measured}")
    if options.json:
        document = {"figures": [asdict(each) for each in figures], "goals": [asdict(each) for each in verdicts]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return int(options.check and not all(goal.met for goal in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
