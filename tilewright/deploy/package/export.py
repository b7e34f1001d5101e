"""``export_package``: a converted model compiled ahead of time by AOTInductor into one ``.pt2`` file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright.convert.text import size
from tilewright.deploy.inputs import arguments, with_dynamic_batch
from tilewright.deploy.package import plain


@dataclass(frozen=True)
class Package:
    """What was written. standalone: whether it runs without Tilewright and without Python."""

    path: Path
    bytes: int
    standalone: bool

    def __str__(self) -> str:
        return f"{self.path.name}: {size(self.bytes)}, {'standalone' if self.standalone else 'calls Tilewright'}"


def export_package(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    standalone: bool = True,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    options: dict[str, Any] | None = None,
) -> Package:
    """Compile ``model`` (converted or not, in eval mode) for the device it is on and write it to ``path``, a ``.pt2``.

    Load it with ``torch._inductor.aoti_load_package`` in Python, or ``torch::inductor::AOTIModelPackageLoader`` in C++.

    example_inputs, dynamic_batch, dynamic_shapes: as of ``export_onnx``. standalone: write every operator of Tilewright
        as PyTorch's own, so that neither Tilewright nor Python is needed to run it; weights stay packed, and are
        unpacked in each call. Otherwise the package calls Tilewright's kernels, which are faster, in a Python process
        that has imported it. options: Inductor's.

    Raises ValueError for a model in training mode or a path without ``.pt2``, RuntimeError without a C++ compiler.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"a package is a .pt2 file, not {target.name!r}")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    args, kwargs = arguments(example_inputs)
    if dynamic_shapes is None and dynamic_batch:
        args, kwargs, dynamic_shapes = with_dynamic_batch(args, kwargs)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        if standalone:
            program = program.run_decompositions(plain.decompositions())
        with tempfile.TemporaryDirectory(prefix=".package-", dir=target.parent, ignore_cleanup_errors=True) as folder:
            written = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, target.name)), inductor_configs=options
            )
            count = Path(written).stat().st_size
            os.replace(written, target)
    return Package(target, count, standalone)
