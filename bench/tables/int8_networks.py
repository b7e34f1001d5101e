"""Accuracy of int8 convolutional networks beside ONNX Runtime's static quantisation, on twenty of timm's.

    python -m bench.tables.int8_networks [--networks NAME ...] [--csv FILE] [--append]

Weights are random and batch-norm statistics are those of real pictures. Both calibrate on the same 16 crops of one half
of scikit-learn's two photographs and are judged on 16 crops of the other half: signal over error in dB against the
float network. ONNX Runtime quantises as ``quantize_static`` does with QDQ, a scale per output channel and unsigned
activations, by percentile and by entropy; the better of the two counts.

How much of an error is the format's: "weights" is the float network with int8 weights alone, "noise" the float network
with noise of -40 dB on its input. Such networks are harder than trained ones: they pass an error on enlarged, layer
after layer.

Needs timm, scikit-learn, onnx and onnxruntime. About a minute for each network on one core.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import sklearn
import timm
import torch
import torch.nn.functional as F
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from sklearn.datasets import load_sample_images
from torch import nn

import tilewright as tw
from bench.result_files import RESULTS
from tilewright.autotune.device import cpu_kind
from tilewright.kernels.cpu import native
from tilewright.kernels.formats import int8
from tilewright.nn import ConvBnAct2d

NETWORKS = (
    *("mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "tf_efficientnet_lite0"),
    *("mnasnet_100", "semnasnet_075", "fbnetc_100", "spnasnet_100", "hardcorenas_a", "lcnet_050", "ghostnet_100"),
    *("resnet18", "resnet26", "regnetx_002", "repvgg_a0", "densenet121", "ese_vovnet19b_dw", "selecsls42b", "dla34"),
)
SIZE = 96
COUNT = 16
METHODS = ("Percentile", "Entropy")
Row = dict[str, object]


def pictures(count: int, seed: int, half: int) -> torch.Tensor:
    """Random square crops of the left or the right half of the photographs, as networks take them: [count, 3, SIZE,
    SIZE].
    """
    photographs = [torch.from_numpy(each).permute(2, 0, 1) / 255 for each in load_sample_images().images]
    generator, crops = torch.Generator().manual_seed(seed), []

    def below(limit: int) -> int:
        return int(torch.randint(0, limit, (), generator=generator))

    for number in range(count):
        image = photographs[number % len(photographs)].chunk(2, 2)[half]
        side = SIZE + below(min(image.shape[1:]) - SIZE + 1)
        top, left = below(image.shape[1] - side + 1), below(image.shape[2] - side + 1)
        crop = image[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if below(2) else crop)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return (torch.cat(crops) - mean) / deviation


def network(name: str) -> nn.Module:
    """One of timm's with random weights and the statistics that its batch-norms find in pictures."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=100).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        for turn in range(3):
            model(pictures(COUNT, 100 + turn, 0))
    return model.eval()


def decibels(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal over error."""
    return 10 * math.log10(expected.double().square().sum() / (y.double() - expected.double()).square().sum())


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, batches: list[torch.Tensor]):
        self.batches = iter(batches)

    def get_next(self) -> dict[str, object] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch.numpy()}


def of_onnx_runtime(model: nn.Module, calibration: list[torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """By method, what the network answers in ONNX Runtime after its static quantisation."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, small = (f"{folder}/{name}.onnx" for name in ("plain", "ready", "int8"))
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        torch.onnx.export(
            model, (x[:4],), plain, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False
        )
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        for method in METHODS:
            quantization.quantize_static(
                ready,
                small,
                _Reader(calibration),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=getattr(quantization.CalibrationMethod, method),
                extra_options={"CalibPercentile": 99.99} if method == "Percentile" else {},
            )
            session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
            found[method.lower()] = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    return found


def with_int8_weights(model: nn.Module) -> nn.Module:
    """The network in float, its convolutions with the weights that int8 has."""
    fused = tw.convert_model(model, "fuse")
    for layer in fused.modules():
        if isinstance(layer, ConvBnAct2d):
            weight = layer.weight_ohwi.detach()
            q, scale = int8.quantize(weight.flatten(1))
            weight.copy_((q * scale[:, None]).view(weight.shape))
    return fused


@torch.no_grad()
def measure(name: str) -> Row:
    """The row of one network."""
    model, x = network(name), pictures(COUNT, 2, 1)
    calibration = list(pictures(COUNT, 1, 0).split(4))
    expected = model(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * (x.square().mean().sqrt() / 100)
    answers = {
        "int8": tw.convert_model(model, "int8", calibration_data=calibration)(x),
        "symmetric": tw.convert_model(model, tw.Int8Static(symmetric=True), calibration_data=calibration)(x),
        **of_onnx_runtime(model, calibration, x),
        "weights": with_int8_weights(model)(x),
        "noise": model(x + noise),
    }
    found = {answer: decibels(y, expected) for answer, y in answers.items()}
    ahead = found["int8"] - max(found[method.lower()] for method in METHODS)
    return {"network": name, **{answer: f"{value:.1f}" for answer, value in found.items()}, "ahead": f"{ahead:+.1f}"}


def about() -> Row:
    """What stands in every row: processor, versions, date."""
    return {
        "machine": cpu_kind().name,
        "isa": native.isa(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "onnxruntime": onnxruntime.__version__,
        "scikit-learn": sklearn.__version__,
        "date": datetime.date.today().isoformat(),
    }


def rows_of(names: list[str]) -> Iterator[Row]:
    """Measure, and print as Markdown on the way."""
    print(
        "| network | int8 | symmetric | ONNX Runtime, percentile | entropy | ahead | weights alone | noise of -40 dB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        row = measure(name)
        columns = ("network", "int8", "symmetric", "percentile", "entropy", "ahead", "weights", "noise")
        print("| " + " | ".join(str(row[column]) for column in columns) + " |", flush=True)
        yield row


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME")
    parser.add_argument(
        "--csv", type=Path, help=f"where to write the rows, for example {RESULTS / 'int8_networks.csv'}"
    )
    parser.add_argument("--append", action="store_true", help="keep the rows that FILE has of other networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch.onnx|timm")
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime's calibrator writes to the root logger
    rows: dict[str, Row] = {}
    if options.csv and options.append and options.csv.exists():
        with options.csv.open(newline="", encoding="utf-8") as file:
            rows = {line["network"]: dict(line) for line in csv.DictReader(file)}
    for row in rows_of(options.networks):
        rows[str(row["network"])] = {**row, **about()}
        if options.csv:
            with options.csv.open("w", newline="", encoding="utf-8") as file:
                lines = csv.DictWriter(file, list(next(iter(rows.values()))), lineterminator="\n")
                lines.writeheader()
                lines.writerows(rows.values())


if __name__ == "__main__":
    main()
