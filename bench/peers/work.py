"""What is compared, with whom, and what was aimed at."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from bench.peers import networks
from bench.peers.contestants import CONTESTANTS, EAGER

#: Largest relative error of a result against float32 eager that a format's rounding explains: of layers (int8 errs by
#: 1 % here, four bits in groups of 128 by 7 %), of encoders (of MiniLM with 128 tokens ours is off by 0.07, OpenVINO's
#: by 0.20), of convolutional networks with random weights, which enlarge what they are given (in MobileNetV2 ours is
#: off by 0.33 and ONNX Runtime's by 0.51; zeros would be off by 1, and an answer to something else by 1.4), and of the
#: log-probabilities of a decoder with random weights (OpenVINO's int4 is off by 0.57).
BOUNDS = {
    "layer": {"fp32": 1e-5, "int8": 0.03, "int8 weights": 0.03, "int4": 0.2, "int4 x int8": 0.2},
    "encoder": {"fp32": 1e-4, "int8": 0.3},
    "network": {"fp32": 1e-3, "int8": 0.7},
    "decoder": {"fp32": 1e-3, "int8": 0.1, "int4": 0.7, "int4 x int8": 0.7},
}


@dataclass(frozen=True)
class Target:
    """The time of the fastest of ``against`` over that of ``ours`` is to be ``wanted`` at least."""

    ours: str
    against: tuple[str, ...]
    wanted: float


@dataclass(frozen=True)
class Work:
    """model: as ``networks.network`` knows it; kind: "layer", "encoder", "network" or "decoder". shape: of the input.
    decode: one token at a time after ``shape``, instead of all of it at once.
    """

    name: str
    kind: str
    model: str
    shape: tuple[int, ...]
    targets: tuple[Target, ...]
    decode: bool = False

    @property
    def contestants(self) -> tuple[str, ...]:
        """All that take part, float32 first: it is what the others are checked against."""
        named = {EAGER} | {target.ours for target in self.targets}
        named |= {name for target in self.targets for name in target.against}
        return tuple(name for name in CONTESTANTS if name in named)

    def bound(self, contestant: str) -> float:
        """Largest relative error of ``contestant``."""
        return BOUNDS[self.kind][CONTESTANTS[contestant].format]


_ONNX_INT8 = "ONNX Runtime int8, dynamic"
_VINO_INT8 = ("OpenVINO int8", "OpenVINO int8, bf16")
_FLOAT = ("ONNX Runtime fp32", "OpenVINO fp32", "torch.compile fp32")
_INT8 = {
    "encoder": (_ONNX_INT8, "ONNX Runtime int8, fused", *_VINO_INT8, "torchao int8"),
    "network": ("ONNX Runtime int8, QDQ", *_VINO_INT8),
    "layer": (_ONNX_INT8, *_VINO_INT8, "torchao int8"),
}
#: By encoder and (batch, tokens), what int8 was to gain over float32.
_OVER_FLOAT = {("MiniLM", (1, 9)): 3.5, ("MiniLM", (32, 22)): 4.0}
_NETWORK_INT8 = {"ResNet-50": 1.1, "MobileNetV2": 1.1, "EfficientNet-B0": 1.3}


def _encoders() -> list[Work]:
    found = []
    for model, shape in product(networks.ENCODERS, ((1, 9), (32, 22), (1, 128), (8, 128))):
        targets = [Target("Tilewright int8", _INT8["encoder"], 1.15)]
        if (model, shape) in _OVER_FLOAT:
            targets.append(Target("Tilewright int8", (EAGER,), _OVER_FLOAT[model, shape]))
        found.append(Work(f"{model} int8, {shape[0]} x {shape[1]} tokens", "encoder", model, shape, tuple(targets)))
    return found


def _networks() -> list[Work]:
    found = []
    for model, batch in product(networks.CONVOLUTIONAL, (1, 8)):
        int8 = Target("Tilewright int8", _INT8["network"], _NETWORK_INT8[model])
        found.append(Work(f"{model} int8, batch {batch}", "network", model, (batch,), (int8,)))
        floating = Target("Tilewright fp32", _FLOAT, 1.05)
        found.append(Work(f"{model} float, batch {batch}", "network", model, (batch,), (floating,)))
    return found


def _layers() -> list[Work]:
    found = []
    for model, rows in product(("4096 x 4096", "2048 x 2048"), (1, 16)):
        words = f"{model}, {rows} row{'s' * (rows > 1)}"
        int8 = Target("Tilewright int8", _INT8["layer"], 1.15)
        found.append(Work(f"int8 layer {words}", "layer", model, (rows,), (int8,)))
    for rows, wanted in ((1, 1.2), (16, 1.5), (128, 1.5)):
        words = f"4096 x 4096, {rows} row{'s' * (rows > 1)}"
        against = ("ONNX Runtime MatMulNBits", "OpenVINO int4", "OpenVINO int4, bf16")
        nbits = Target("Tilewright w4a8", against, wanted)
        over = Target("Tilewright w4a8", (EAGER,), 2.5 if rows >= 32 else 1.0)
        found.append(Work(f"int4 x int8 layer {words}", "layer", "4096 x 4096", (rows,), (nbits, over)))
        never_slower = (
            Target("Tilewright int4", (EAGER,), 1.0),
            Target("Tilewright int8 weight-only", (EAGER,), 1.0),
        )
        found.append(Work(f"weight-only layer {words}", "layer", "4096 x 4096", (rows,), never_slower))
    return found


def _decoder() -> list[Work]:
    llama, vino = ("llama.cpp Q4_0",), ("OpenVINO int4",)
    step = (
        Target("Tilewright w4a8", llama, 1.5),
        Target("Tilewright int4", llama, 1.3),
        Target("Tilewright w4a8", vino, 1.1),
        Target("Tilewright int8", ("llama.cpp Q8_0",), 1.0),
    )
    model = networks.DECODER
    found = [Work(f"{model}, one token", "decoder", model, (1, 32), step, decode=True)]
    for tokens, ratio in ((512, 5.5), (32, 3.7)):
        targets = (Target("Tilewright w4a8", llama, ratio), Target("Tilewright w4a8", vino, 1.2))
        found.append(Work(f"{model}, prompt of {tokens}", "decoder", model, (1, tokens), targets))
    return found


WORK = {work.name: work for work in (*_encoders(), *_networks(), *_layers(), *_decoder())}
