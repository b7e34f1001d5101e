"""Convolutional networks on this CPU, side by side: PyTorch, ours in float32 and int8, and ONNX Runtime in both.

    python -m bench.tables.conv [--models resnet50 ...] [--batches 1 8] [--csv FILE] [--no-onnx]

Networks come from Hugging Face configs with random weights, their batch-norms set by one batch of random images, so
that activations have the size of a trained network's (with the initial ones they vanish, and PyTorch computes with
subnormal numbers). 224 x 224 pixels, two threads. The variants are timed in turn in one process and the medians
compared. Threads spin for a while after each run, ONNX Runtime's for up to 60 ms, and slow down whatever comes next: so
every measurement waits until they rest, and follows one run that is not counted. onnx, onnxruntime and onnxscript are
needed for ONNX Runtime's columns only.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tilewright as tw
from bench.peers.networks import Logits
from bench.result_files import RESULTS, write_measured
from bench.timer import interleaved

THREADS = 2
#: Largest relative error of the logits from float32 rounding. On random weights and images int8 has no bound to speak
#: of, ours or ONNX Runtime's: their errors are printed side by side.
ERRORS = {"fused": 1e-3}


def model(name: str) -> nn.Module:
    """A network by name, in eval mode, with random weights."""
    import transformers as hf

    torch.manual_seed(0)
    if name == "resnet50":
        network: Any = hf.ResNetForImageClassification(hf.ResNetConfig())
    elif name == "mobilenetv2":
        network = hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config())
    elif name == "efficientnet-b0":
        b0 = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
        network = hf.EfficientNetForImageClassification(hf.EfficientNetConfig(**b0, dropout_rate=0.2))
    else:
        raise ValueError(f"model {name!r} is unknown; the known ones are {', '.join(MODELS)}")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 224, 224))
    return Logits(network).eval()


MODELS = ("resnet50", "mobilenetv2", "efficientnet-b0")


Run = Callable[[torch.Tensor], Any]


def ours(name: str) -> dict[str, Run]:
    """The converted networks as functions of the images."""
    torch.manual_seed(1)
    images = [torch.randn(4, 3, 224, 224) for _ in range(2)]
    return {
        "fused": tw.convert_model(model(name), "fuse"),
        "int8": tw.convert_model(model(name), "int8", calibration_data=images),
    }


def onnx_runtime(network: nn.Module, folder: Path) -> dict[str, Run]:
    """ONNX Runtime's float32 and static int8 (QDQ, weights per channel) sessions."""
    import onnxruntime
    from onnxruntime import quantization

    paths = [str(folder / f"{stage}.onnx") for stage in ("float", "prepared", "int8")]
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        network,
        (torch.randn(2, 3, 224, 224),),
        paths[0],
        input_names=["x"],
        dynamic_shapes={"x": {0: batch}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    quantization.quant_pre_process(paths[0], paths[1], skip_symbolic_shape=True)

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [torch.randn(4, 3, 224, 224).numpy() for _ in range(2)]

        def get_next(self) -> dict[str, Any] | None:
            return {"x": self.left.pop()} if self.left else None

    quantization.quantize_static(
        paths[1],
        paths[2],
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS

    def session(path: str) -> Run:
        made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(made.run(None, {"x": x.numpy()})[0])

    return {"ONNX Runtime fp32": session(paths[0]), "ONNX Runtime int8": session(paths[2])}


def measure(name: str, batches: list[int], onnx: bool, seconds: float) -> list[dict[str, object]]:
    """A row for each batch and variant. Raises ValueError if an output is wrong."""
    eager = model(name)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        variants: dict[str, Run] = {"eager": eager, **ours(name)}
        if onnx:
            variants |= onnx_runtime(eager, Path(folder))
        for batch in batches:
            x = torch.randn(batch, 3, 224, 224)
            with torch.inference_mode():
                expected = eager(x)
                errors: dict[str, float] = {}
                for variant, run in variants.items():
                    for _ in range(3):  # the third call is the first that replays a recording
                        errors[variant] = error = ((run(x) - expected).norm() / expected.norm()).item()
                    if not error <= ERRORS.get(variant, math.inf):
                        raise ValueError(f"{variant} {name} at batch {batch} has a relative error of {error:.2g}")
                calls = {variant: (lambda run=run, x=x: run(x)) for variant, run in variants.items()}
                medians = interleaved(calls, seconds=seconds, rest=True).medians()
            rows += [
                {
                    "model": name,
                    "batch": batch,
                    "variant": variant,
                    "ms": f"{1e3 * value:.2f}",
                    "speedup": f"{medians['eager'] / value:.2f}",
                    "error": f"{errors[variant]:.2g}",
                }
                for variant, value in medians.items()
            ]
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """Speed-up over eager float32: a line for each network and batch."""
    names = list(dict.fromkeys(str(row["variant"]) for row in rows))[1:]
    print("| network | batch | eager ms | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 3) + "|")
    for network, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        cells = {str(row["variant"]): row for row in rows if (row["model"], row["batch"]) == (network, batch)}
        values = " | ".join(f"{cells[name]['speedup']}x (error {cells[name]['error']})" for name in names)
        print(f"| {network} | {batch} | {cells['eager']['ms']} | {values} |")


def main() -> None:
    """Measure, print the table and write it with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each network and batch; default: 10")
    parser.add_argument("--no-onnx", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument("--csv", type=Path, help=f"where to write the rows, for example {RESULTS / 'cpu_conv.csv'}")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows = [
        row for name in options.models for row in measure(name, options.batches, not options.no_onnx, options.seconds)
    ]
    print_table(rows)
    if options.csv:
        write_measured(options.csv, rows)


if __name__ == "__main__":
    main()
