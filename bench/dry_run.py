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
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

OPS = ("quantize_per_row", "int8_linear", "int8_weight_only_linear", "int4_linear", "int4_int8_linear")
H200: dict[str, Any] = {
    "device": "cuda",
    "capability": (9, 0),
    "multiprocessors": 132,
    "device_name": "NVIDIA H200",
}
#: Sums in the library follow these kernels: they are no whole operator when they are emulated.
INCOMPLETE = ("int4_linear.triton_dequantize",)


def kernels(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """Every tunable kernel with a problem as it would pose itself on an H200."""
    from tilewright.kernels import tuning
    from tilewright.kernels.problem import Problem

    for op in OPS:
        group = {"group_size": 64, "symmetric": False} if op.startswith("int4") else {}
        problem = Problem(op, m, n if "linear" in op else 0, k, dtype, bias=True, **group, **H200)
        yield from tuning.kernels_for(problem)


def _report(name: str, config: Any, begin: float, wrong: str | None) -> bool:
    print(f"{name:42}{str(config)[:90]:92}{time.monotonic() - begin:7.1f} s  {wrong or 'right'}", flush=True)
    return wrong is None


def interpret() -> bool:
    """Needs TRITON_INTERPRET=1 before Triton is imported."""
    from tilewright import autotune
    from tilewright.autotune import racing
    from tilewright.kernels import tuning
    from tilewright.kernels.samples import make_arguments

    racing.ROUNDS = ((1, 10.0), (1, 1.0))
    right = True
    for tuned, asked in kernels(16, 72, 192, torch.float16):
        begin = time.monotonic()
        arguments = make_arguments(asked)
        function = getattr(importlib.import_module(tuned.modules[0]), asked.op)
        config = tuned.heuristic(asked)
        with tuned.forced(config):
            wrong = tuning.Checker(asked.op, arguments)(function(**arguments))
        right &= _report(tuned.name, config, begin, wrong)
        begin = time.monotonic()
        here = replace(asked, device="cpu")
        few = tuned.split_candidates(tuning.representative(here))[0][:2]
        outcome = autotune.tune(tuned, here, budget=60, candidates=few, save=False)
        failed = "; ".join(outcome.failed.values()) or outcome.reason or None
        right &= _report(f"{tuned.name}, tuned", outcome.config, begin, failed)
    return right


def emulate() -> bool:
    """Each kernel with the configuration that its heuristic takes for small and for large batches."""
    from tilewright.aot.compiler import emulate_launch
    from tilewright.aot.launch import recorded
    from tilewright.kernels import tuning
    from tilewright.kernels.samples import make_arguments

    right = True
    for m in (16, 64):
        for tuned, asked in kernels(m, 128, 256, torch.bfloat16):
            if tuned.name in INCOMPLETE:
                continue
            begin = time.monotonic()
            arguments = make_arguments(asked)
            function = getattr(importlib.import_module(tuned.modules[0]), asked.op)
            config = tuned.heuristic(asked)
            with recorded() as launches, tuned.forced(config):
                result = function(**arguments)
            try:
                for launch in launches:
                    constants = dict(launch.constants)
                    constants |= {"INLINE_PTX": True} if "INLINE_PTX" in constants else {}
                    emulate_launch(replace(launch, constants=constants), "sm_90")
                wrong = tuning.Checker(asked.op, arguments)(result)
            except Exception as error:  # the emulator has its limits, and a kernel its defects
                wrong = f"{type(error).__name__}: {error}"[:200]
            right &= _report(tuned.name, config, begin, wrong)
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
