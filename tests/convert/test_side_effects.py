"""What tilewright does to a model changes nothing that others share: a table of what a process has one of."""

from __future__ import annotations

import copy
import logging
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import SmallMobileNet, settled
from tilewright.deploy import export_onnx

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

OURS = "tilewright"


def interfaces() -> dict[str, Any]:
    """The tables of transformers, but for our attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tables = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return {type(t).__name__: {name: t[name] for name in t.valid_keys() if name != OURS} for t in tables}


#: What there is one of in a process (or a thread), and how to read it.
STATES: dict[str, Callable[[], Any]] = {
    "torch's random numbers": lambda: torch.get_rng_state().tolist(),
    "numpy's random numbers": lambda: str(numpy.random.get_state()),  # noqa: NPY002  (there is one of it, so it is asked)
    "random numbers": random.getstate,
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "threads": lambda: (torch.get_num_threads(), torch.get_num_interop_threads()),
    "float32 products": torch.get_float32_matmul_precision,
    "deterministic algorithms": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ),
    "anomaly detection": torch.is_anomaly_enabled,
    "gradients": lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    "modes": lambda: (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
    "native attention": torch.backends.mha.get_fastpath_enabled,
    "oneDNN": lambda: (torch.backends.mkldnn.enabled, torch._C._get_onednn_allow_tf32()),
    "quantized engine": lambda: torch.backends.quantized.engine,
    "attention backends": lambda: (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ),
    "cuDNN": lambda: (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
    "classes of modules": lambda: {
        kind: (kind.__call__, kind.__setattr__, kind.__getattr__, kind.forward, kind.state_dict)
        for kind in (nn.Module, nn.Linear, nn.Conv2d, nn.BatchNorm2d, transformers.PreTrainedModel)
    },
    "functions of transformers": lambda: {
        name: getattr(transformers.PreTrainedModel, name).__func__
        if hasattr(getattr(transformers.PreTrainedModel, name), "__func__")
        else getattr(transformers.PreTrainedModel, name)
        for name in ("save_pretrained", "from_pretrained", "set_attn_implementation", "__init__")
    },
    "hooks of all modules": lambda: {
        name: dict(value)
        for name, value in vars(torch.nn.modules.module).items()
        if name.startswith("_global_") and value
    },
    "tables of transformers": interfaces,
    "environment": lambda: dict(os.environ),
    "working directory": os.getcwd,
    "path": lambda: list(sys.path),
    "warnings": lambda: (list(warnings.filters), warnings.showwarning),
    "logging": lambda: (
        list(logging.getLogger().handlers),
        logging.getLogger().level,
        logging.root.manager.disable,
        [(h, h.level) for h in logging.getLogger("transformers").handlers],
    ),
    "signals": lambda: [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    "recursion": sys.getrecursionlimit,
    "streams": lambda: (sys.stdout, sys.stderr, sys.excepthook),
    "compiler": lambda: torch._dynamo.config.get_config_copy() if "torch._dynamo" in sys.modules else None,
}


def snapshot() -> dict[str, Any]:
    return {name: read() for name, read in STATES.items()}


def bert(config: Any) -> nn.Module:
    return transformers.BertForMaskedLM(config).eval()


CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IDS = torch.arange(2, 26).reshape(2, 12)
IMAGES = torch.arange(2 * 144.0).reshape(2, 1, 12, 12).sin()


def transformer() -> tuple[nn.Module, Callable[[], nn.Module], dict[str, torch.Tensor]]:
    config = transformers.BertConfig(**CONFIG, vocab_size=96)
    return bert(config), lambda: bert(config), {"input_ids": IDS}


def network() -> tuple[nn.Module, Callable[[], nn.Module], dict[str, torch.Tensor]]:
    return settled(SmallMobileNet()), lambda: SmallMobileNet().eval(), {"x": IMAGES}


Steps = dict[str, Callable[[], Any]]


def steps(build: Callable[[], tuple[nn.Module, Callable[[], nn.Module], dict[str, Any]]], folder: Path) -> Steps:
    """All that is done to a model, each step with what came of the one before."""
    model, factory, inputs = build()
    made: dict[str, nn.Module] = {"model": model}

    def convert(name: str, **options: Any) -> Callable[[], None]:
        def step() -> None:
            made[name] = tw.convert_model(made["model"], "int8", **options)

        return step

    def call(name: str) -> Callable[[], None]:
        def step() -> None:
            for _ in range(3):
                made[name](**inputs)
            with torch.inference_mode():
                for _ in range(3):
                    made[name](**inputs)

        return step

    def load() -> None:
        made["loaded"] = tw.load_model(folder, factory)

    data = [inputs]
    return {
        "convert": convert("small", calibration_data=data) if "x" in inputs else convert("small"),
        "call": call("small"),
        "convert with data": convert("calibrated", calibration_data=data),
        "call with data": call("calibrated"),
        "time": convert("timed", calibration_data=data, example_inputs=data, keep_if_faster=False),
        "report": lambda: str(tw.report(made["small"], data)),
        "save": lambda: tw.save_model(made["small"], folder),
        "load": load,
        "call what was loaded": call("loaded"),
        "export": lambda: torch.export.export(made["small"], (), inputs),
        "export to ONNX": lambda: export_onnx(made["small"], folder.with_suffix(".onnx"), inputs),
        "copy": lambda: copy.deepcopy(made["small"]),
        "revert": lambda: tw.revert_model(made["small"]),
        "convert in place": convert("inplace", calibration_data=data, inplace=True),
        "revert in place": lambda: tw.revert_model(made["inplace"], inplace=True),
    }


@pytest.mark.parametrize("build", [transformer, network])
def test_no_step_changes_what_the_process_has_one_of(build: Any, tmp_path: Path) -> None:
    todo = steps(build, tmp_path / "model")
    expected = snapshot()
    for step, run in todo.items():
        run()
        found = snapshot()
        if step == "load":  # the factory draws the weights of the model that it builds
            expected["torch's random numbers"] = found["torch's random numbers"]
        assert {name for name in STATES if found[name] != expected[name]} == set(), step


def test_the_first_of_everything_in_a_process_draws_no_random_numbers() -> None:
    """Kernels check themselves at their first use."""
    code = """
import torch
from torch import nn
import tilewright as tw

torch.manual_seed(0)
conv = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.Linear(64, 64)).eval()
linear = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
x, y = torch.randn(2, 8, 8, 8), torch.randn(40, 64)
before = torch.get_rng_state()
with torch.no_grad():
    for recipe in ("fuse", "int8"):
        small = tw.convert_model(conv, recipe, calibration_data=[x])
        small(x), tw.report(small, [x])
    for recipe in ("int8", "int8-weight-only", "int4-g32", "w4a8-g32", "sparse24", "sparse24-int8", "sparse24-int4"):
        small = tw.convert_model(linear, recipe, calibration_data=[y])
        small(y), small(y[:1]), tw.report(small, [y])
assert torch.equal(before, torch.get_rng_state())
"""
    for isa in ("", "off"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "TILEWRIGHT_CPU_ISA": isa},
        )
        assert done.returncode == 0, done.stderr


def test_calibration_leaves_other_threads_their_switches() -> None:
    seen: queue.SimpleQueue[bool] = queue.SimpleQueue()  # no state that the converter would put back

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=lambda: seen.put(torch.backends.mha.get_fastpath_enabled()))
            thread.start()
            thread.join()
            return self.layer(x)

    tw.convert_model(Asks(), "int8", calibration_data=[torch.randn(2, 64)])
    assert not seen.empty() and all(seen.get() for _ in range(seen.qsize()))
