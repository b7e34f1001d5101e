"""Our Triton kernels on a machine without a GPU, as a benchmark would call them: small, but every step but the time.

    python -m bench.dry_run interpret     in Triton's interpreter, in float16: heuristics' configurations, then a tuning
    python -m bench.dry_run emulate       compiled for sm_90 as on an H200 and run on the emulated GPU, in bfloat16
    python -m bench.dry_run compile       every configuration the tuner may try on an H200, compiled; slow

Results are compared with the definition.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

OPS = (
    "quantize_per_row",
    "rms_norm_quantize",
    "layer_norm_quantize",
    "int8_linear",
    "int8_linear_quantized",
    "int8_weight_only_linear",
    "int4_linear",
    "int4_int8_linear",
)
H200: dict[str, Any] = {
    "device": "cuda",
    "capability": (9, 0),
    "multiprocessors": 132,
    "device_name": "NVIDIA H200",
}
#: Sums in the library follow these kernels: they are no whole operator when they are emulated.
INCOMPLETE = ("int4_linear.triton_dequantize",)


@dataclass(frozen=True)
class Case:
    """One kernel on a problem. tuned: None for a kernel without configurations."""

    name: str
    op: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    tuned: Any = None
    asked: Any = None

    @property
    def config(self) -> Any:
        """The heuristic's configuration."""
        return None if self.tuned is None else self.tuned.heuristic(self.asked)

    def run(self) -> Any:
        """Launch the kernel with that configuration."""
        with self.tuned.forced(self.config) if self.tuned is not None else nullcontext():
            return self.function(**self.arguments)

    def wrong(self, result: Any) -> str | None:
        """What differs from the definition, in words, or None."""
        from bench.problems import SPARSE
        from bench.tables.sparse24_gpu import assert_near_definition
        from tilewright.kernels import tuning

        if self.op not in SPARSE:
            return tuning.Checker(self.op, self.arguments)(result)
        try:
            assert_near_definition(self.op, self.arguments, result)
        except ValueError as error:
            return str(error)
        return None


def kernels(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Every tunable kernel of a linear layer with a problem as it would pose itself on an H200."""
    from tilewright.kernels import tuning
    from tilewright.kernels.dispatch.problem import Problem

    for op in OPS:
        group = {"group_size": 64, "symmetric": False} if op.startswith("int4") else {}
        x_dtype, bias = torch.int8 if op == "int8_linear_quantized" else dtype, "norm" not in op
        problem = Problem(op, m, n if "linear" in op else 0, k, x_dtype, bias=bias, **group, **H200)
        yield from tuning.kernels_for(problem)


def convolutions(dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Each family of convolutions in float and in int8: 1 x 1, depthwise, few channels, and all others."""
    from tilewright.kernels import tuning
    from tilewright.kernels.conv_geometry import ConvGeometry
    from tilewright.kernels.dispatch.problem import Problem

    for sizes in (
        ConvGeometry(2, 64, 8, 8, 48, (1, 1)),
        ConvGeometry(1, 32, 9, 9, 32, (3, 3), padding=(1, 1, 1, 1), groups=32),
        ConvGeometry(1, 3, 16, 16, 32, (7, 7), (2, 2), (3, 3, 3, 3)),
        ConvGeometry(1, 32, 8, 8, 40, (3, 3), padding=(1, 1, 1, 1)),
    ):
        for op, x_dtype in (("conv2d_fused", dtype), ("int8_conv2d_fused", torch.int8)):
            m, k = sizes.batch * sizes.out_height * sizes.out_width, sizes.taps * sizes.group_channels
            facts = {"bias": True, "activation": "relu", "conv": sizes, "out_dtype": x_dtype, **H200}
            # The first is the one that the router prefers.
            yield next(iter(tuning.kernels_for(Problem(op, m, sizes.out_channels, k, x_dtype, **facts))))


def cases(m: int, n: int, k: int, dtype: torch.dtype, sparse: Sequence[str], others: bool = True) -> Iterator[Case]:
    """Every kernel of the package. sparse: modules of 2:4 kernels. others: with those that know no rows, too."""
    from bench.problems import SPARSE, Shape
    from bench.problems import make_arguments as bench_arguments
    from tilewright.kernels.dispatch.card import make_arguments
    from tilewright.kernels.int8_conv2d import triton_quantize

    for tuned, asked in (*kernels(m, n, k, dtype), *(convolutions(dtype) if others else ())):
        function = getattr(importlib.import_module(tuned.modules[0]), asked.op)
        name = tuned.name if asked.conv is None else f"{tuned.name} ({asked.op.split('_')[0]})"
        yield Case(name, asked.op, function, make_arguments(asked), tuned, asked)
    for module in sparse:
        made = importlib.import_module(f"tilewright.kernels.sparse24_linear.{module}")
        for op in SPARSE:
            if hasattr(made, op):
                arguments = bench_arguments(op, Shape(m, n, k, dtype, group_size=128))
                yield Case(f"{module} ({op})", op, getattr(made, op), arguments)
    if others:
        x = torch.randn(m, k).to(dtype)
        arguments = {"x": x, "scale": 1 / 40}
        yield Case("quantize_per_tensor", "quantize_per_tensor", triton_quantize.quantize_per_tensor, arguments)


def _report(name: str, config: Any, begin: float, wrong: str | None) -> bool:
    print(f"{name:46}{str(config)[:90]:92}{time.monotonic() - begin:7.1f} s  {wrong or 'right'}", flush=True)
    return wrong is None


def interpret() -> bool:
    """Needs TRITON_INTERPRET=1 before Triton is imported. ``mma.sp`` is inline PTX, which cannot be interpreted."""
    from tilewright import autotune
    from tilewright.autotune import racing
    from tilewright.kernels import tuning

    racing.ROUNDS = ((1, 10.0), (1, 1.0))
    right = True
    for case in cases(16, 72, 256, torch.float16, ["triton_unpack"]):
        begin = time.monotonic()
        right &= _report(case.name, case.config, begin, case.wrong(case.run()))
        if case.tuned is None:
            continue
        begin = time.monotonic()
        here = replace(case.asked, device="cpu")
        few = case.tuned.split_candidates(tuning.representative(here))[0][:2]
        outcome = autotune.tune(case.tuned, here, budget=60, candidates=few, save=False)
        # A loaded machine leaves the race without a winner; all the same every candidate ran and was checked.
        untried = None if outcome.seconds else outcome.reason or "nothing was timed"
        failed = "; ".join(outcome.failed.values()) or untried
        right &= _report(f"{case.name}, tuned", outcome.config, begin, failed)
    return right


def emulate() -> bool:
    """Each kernel with the configuration that its heuristic takes for small and for large batches."""
    from tilewright.aot.compiler import emulate_launch
    from tilewright.aot.launch import recorded

    right = True
    for m in (16, 64):
        for case in cases(m, 128, 256, torch.bfloat16, ["triton_unpack", "triton_fragments"], others=m == 16):
            if case.name in INCOMPLETE:
                continue
            begin = time.monotonic()
            with recorded() as launches:
                result = case.run()
            try:
                for launch in launches:
                    constants = dict(launch.constants)
                    constants |= {"INLINE_PTX": True} if "INLINE_PTX" in constants else {}
                    emulate_launch(replace(launch, constants=constants), "sm_90")
                wrong = case.wrong(result)
            except Exception as error:  # the emulator has its limits, and a kernel its defects
                wrong = f"{type(error).__name__}: {error}"[:200]
            right &= _report(case.name, case.config, begin, wrong)
    return right


def compile_all() -> bool:
    """Compile every candidate for the sizes of the tables, and say what is dropped."""
    from tilewright import autotune

    right = True
    for m in (1, 16, 64, 128, 512, 4096):
        for tuned, asked in kernels(m, 4096, 4096, torch.bfloat16):
            begin = time.monotonic()
            pruned = autotune.prune(tuned, asked, "sm_90")
            broken = [reason for reason in pruned.dropped.values() if reason.startswith("does not compile")]
            words = f"M = {m}: {len(pruned.kept)} kept, {len(pruned.dropped)} dropped"
            right &= _report(tuned.name, words, begin, broken[0][:200] if broken else None)
    return right


def main(arguments: list[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("interpret", "emulate", "compile"))
    how = parser.parse_args(arguments).how
    if how == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it once, when it is imported.
        command = [sys.executable, "-m", "bench.dry_run", how]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    return int(not {"interpret": interpret, "emulate": emulate, "compile": compile_all}[how]())


if __name__ == "__main__":
    sys.exit(main())
