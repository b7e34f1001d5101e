"""The problems that ``tilewright tune`` is asked to tune for: of a model's layers, or of a run of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from tilewright.commands.model_files import example_input
from tilewright.convert import calibrate
from tilewright.convert.checkpoint.manifest import read_manifest
from tilewright.convert.checkpoint.native import load_model
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import record_problems
from tilewright.nn import QuantizedLinear
from tilewright.nn.kinds import registered_kinds


def of_manifest(folder: Path, batches: Sequence[int], dtype: torch.dtype | None) -> tuple[list[Problem], int]:
    """(problems of the linear layers in a folder that ``save_model`` wrote, with ``batches`` rows; how many layers are
    none). dtype: of the activations, each layer's by default. Reads no weight. Raises CheckpointError.
    """
    found: list[Problem] = []
    others, kinds = 0, registered_kinds()
    for layer in read_manifest(folder).layers.values():
        made = kinds[layer.module](**layer.config, device="meta") if layer.module in kinds else None
        if isinstance(made, QuantizedLinear):
            found += [made.problem(m, dtype) for m in batches]
        else:
            others += 1
    return found, others


def of_run(
    folder: Path,
    factory: Callable[[], nn.Module],
    batches: Sequence[int],
    tokens: int | None,
    image: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
) -> list[Problem]:
    """What the operators of a saved model are asked when it runs on ``device``, once for each batch of inputs.

    factory: as of ``load_model``. tokens, image: what an input looks like, as of ``model_files.example_input``. dtype:
    that the model is cast to. Raises CheckpointError, and ValueError without an input.
    """
    model = load_model(folder, factory, device=device)
    if dtype is not None:
        model = model.to(dtype)
    found: list[Problem] = []
    for batch in batches:
        inputs = example_input(batch, tokens, image)
        if inputs is None:
            raise ValueError("--model needs --image C,H,W or --tokens COUNT: what an input looks like")
        inputs = torch.zeros_like(inputs, device=device)
        if dtype is not None and inputs.is_floating_point():
            inputs = inputs.to(dtype)
        with calibrate.evaluation(model), torch.inference_mode(), record_problems() as problems:
            calibrate.call(model, inputs)
        found += problems
    return found
