"""Compile a launch for a chip that is not here, and read what came out.

    compiled = compile_launch(launch, "sm_90")
    compiled.registers, compiled.spill_bytes, compiled.instructions.matrix

Needs no GPU: ``ptxas`` and ``cuobjdump`` come inside the Triton package, AMD's assembler is part of it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewright.aot.assembly import (
    Instructions,
    Resources,
    read_amd_metadata,
    read_amdgcn,
    read_ptx,
    read_resource_usage,
)
from tilewright.aot.launch import Launch
from tilewright.aot.specialize import Specialization, backend_of, specialize
from tilewright.aot.targets import Target, find_target


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target.

    text: PTX, or AMD assembly. registers: for each thread. spill_bytes: memory private to a thread that was needed
    for want of registers. shared_bytes: shared memory of one block. triton_version: the compiler that made it.
    """

    target: Target
    text: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Instructions
    num_warps: int
    num_stages: int
    specialization: Specialization
    triton_version: str

    @property
    def over_limits(self) -> list[str]:
        """In words, each limit of the target that the kernel breaks: then it cannot be launched there."""
        found = []
        for what, used, most in (
            ("bytes of shared memory", self.shared_bytes, self.target.shared_bytes),
            ("registers", self.registers, self.target.registers),
        ):
            if used > most:
                found.append(f"{used} {what}, {self.target.name} has {most}")
        return found


def compile_launch(launch: Launch, target: str | Target) -> Compiled:
    """Compile ``launch`` for a target of ``targets.TARGETS``, specialised as launching it there would be.

    Raises ValueError for an unknown target or wrong arguments, FileNotFoundError where Triton came without
    ``cuobjdump``, and whatever Triton raises for a kernel that does not compile.
    """
    target = find_target(target)
    special = specialize(launch, target)
    options = backend_of(target).parse_options({"num_warps": launch.num_warps, "num_stages": launch.num_stages})
    kernel = triton.compile(
        ASTSource(launch.kernel, special.signature, special.constants, special.attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=options.__dict__,
    )
    if target.backend == "cuda":
        text = kernel.asm["ptx"]
        instructions, resources = read_ptx(text), _cubin_resources(kernel.asm["cubin"])
    else:
        text = kernel.asm["amdgcn"]
        instructions, resources = read_amdgcn(text), read_amd_metadata(text)
    return Compiled(
        target=target,
        text=text,
        registers=resources.registers,
        spill_bytes=resources.spill_bytes,
        shared_bytes=kernel.metadata.shared,
        instructions=instructions,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        specialization=special,
        triton_version=triton.__version__,
    )


def find_cuobjdump() -> str:
    """``cuobjdump`` of the Triton package, else the one on PATH. Raises FileNotFoundError naming both places."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"cuobjdump is neither at {shipped} nor on PATH: registers and spills cannot be read")
    return found


def _cubin_resources(cubin: bytes) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_cuobjdump(), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"cuobjdump failed with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return read_resource_usage(done.stdout)
