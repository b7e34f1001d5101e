"""``export_onnx``: a converted model as an ONNX file whose weights stay quantised."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright.convert.text import closest, size
from tilewright.deploy.inputs import arguments, with_dynamic_batch
from tilewright.deploy.onnx import symbols
from tilewright.deploy.onnx.lower import ACCURACY_LEVELS, lower

#: A protocol buffer holds less than 2 GiB; the graph itself needs a little of that.
LARGEST_FILE = 2**31 - 2**24
#: The first opset with Gelu in both forms and int4.
OPSET = 21


@dataclass(frozen=True)
class OnnxFile:
    """What was written. data_path: the file beside it that holds the weights, if they do not fit. operators: counts."""

    path: Path
    data_path: Path | None
    bytes: int
    operators: dict[str, int]

    def __str__(self) -> str:
        beside = f", weights in {self.data_path.name}" if self.data_path else ""
        counts = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        return f"{self.path.name}: {size(self.bytes)}{beside} ({counts})"


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    accuracy: str = "float32",
    external_data: bool | None = None,
    opset: int = OPSET,
) -> OnnxFile:
    """Write ``model`` (converted or not, in eval mode) to ``path`` in ONNX. Needs the extra ``tilewright[onnx]``.

    example_inputs: one tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
    dynamic_batch: let the first dimension of every input tensor be any size, the same for all. dynamic_shapes: in place
        of that, what ``torch.export.export`` takes.
    accuracy: what ONNX Runtime may round activations to for the product with int4 weights (``accuracy_level`` of
        ``MatMulNBits``): "float32", "float16", "bfloat16" or "int8", the fastest on CPUs.
    external_data: keep the weights in a file of their own beside the model, ``<name>.data``; None: if they would not
        fit into one file, whose limit is 2 GB.

    int4 weights become ``com.microsoft.MatMulNBits``, bit for bit; int8 weights and static int8 convolutions standard
    QDQ. Raises ImportError without onnx and onnxscript, ValueError for a model in training mode or a bad argument,
    NotImplementedError for an operator that ONNX cannot express. A file that was there stays if the export fails.
    """
    if accuracy not in ACCURACY_LEVELS:
        raise ValueError(
            f"accuracy {accuracy!r} is unknown{closest(accuracy, ACCURACY_LEVELS)}; known: {', '.join(ACCURACY_LEVELS)}"
        )
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    try:
        import onnx_ir as ir
        import onnxscript  # noqa: F401  (PyTorch's exporter is built on it)
        from onnx_ir.passes import common
    except ImportError as error:
        raise ImportError("export_onnx needs onnx and onnxscript: pip install 'tilewright[onnx]'") from error
    args, kwargs = arguments(example_inputs)
    if dynamic_shapes is None and dynamic_batch:
        args, kwargs, dynamic_shapes = with_dynamic_batch(args, kwargs)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        program = program.run_decompositions(symbols.decompositions())
        exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False, opset_version=opset)
    if exported is None:
        raise RuntimeError("PyTorch's ONNX exporter returned nothing")
    lower(ir, exported.model, ACCURACY_LEVELS[accuracy])
    for tidy in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass()):
        tidy(exported.model)
    weights = sum(value.const_value.nbytes for value in exported.model.graph.initializers.values())
    external = weights > LARGEST_FILE if external_data is None else external_data
    if not external and weights > LARGEST_FILE:
        raise ValueError(f"{size(weights)} of weights do not fit into one ONNX file: leave external_data at None")
    return _write(exported, Path(path), external)


def _write(exported: Any, path: Path, external: bool) -> OnnxFile:
    """To a temporary folder first, so that no half-written file takes the place of one that was there."""
    data_name = f"{path.name}.data"
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        exported.save(folder / path.name, external_data=external)
        written = sum(each.stat().st_size for each in folder.iterdir())
        if external:
            os.replace(folder / data_name, path.with_name(data_name))
        os.replace(folder / path.name, path)
    if not external:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(data_name).unlink()  # of an earlier export, which nothing refers to any more
    counts = Counter(node.op_type for node in exported.model.graph)
    return OnnxFile(path, path.with_name(data_name) if external else None, written, dict(counts.most_common()))
