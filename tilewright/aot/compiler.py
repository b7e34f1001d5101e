"""Compile a kernel for a chip that is not here, read what came out, and run it on an emulated one.

Needs no GPU: ``ptxas`` and ``cuobjdump`` come inside the Triton package, AMD's assembler is part of it.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewright.aot.assembly import (
    Instructions,
    Resources,
    Sass,
    read_amd_metadata,
    read_amdgcn,
    read_ptx,
    read_resource_usage,
    read_sass,
)
from tilewright.aot.emulator import Stats, emulate
from tilewright.aot.launch import Launch
from tilewright.aot.specialize import Specialization, backend_of, parse_signature, pointer_type, specialize
from tilewright.aot.targets import Target, find_target

#: Architectures whose PTX the emulator runs.
EMULATED = (80, 90)


@dataclass(frozen=True)
class Config:
    """What a launch fixes beyond its constants: warps of a block, and stages of the software pipeline."""

    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target.

    text: PTX, or AMD assembly. resources: registers, spills and shared memory. instructions: counts of ``text``.
    triton_version: the compiler that made it. binary: the cubin, or AMD's code object.
    """

    target: Target
    text: str
    resources: Resources
    instructions: Instructions
    num_warps: int
    num_stages: int
    specialization: Specialization
    triton_version: str
    binary: bytes = field(repr=False)

    @property
    def registers(self) -> int:
        """Registers of one thread."""
        return self.resources.registers

    @property
    def spill_bytes(self) -> int:
        """Memory private to a thread that was needed for want of registers."""
        return self.resources.spill_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block."""
        return self.resources.shared_bytes

    @functools.cached_property
    def sass(self) -> Sass:
        """Counts of the machine code, which ``ptxas`` made of the PTX; disassembled when first asked for.

        Raises ValueError for a target of another vendor, FileNotFoundError without ``cuobjdump``, and RuntimeError
        where that does not know the chip.
        """
        if self.target.backend != "cuda":
            raise ValueError(f"{self.target.name} has no SASS")
        return read_sass(_cuobjdump("--dump-sass", self.binary))

    @property
    def ptx(self) -> str:
        """The PTX text. Raises ValueError for a target of another vendor."""
        if self.target.backend != "cuda":
            raise ValueError(f"{self.target.name} has no PTX")
        return self.text

    def emulate(self, grid: int | Sequence[int], args: Mapping[str, Any] | Sequence[Any], **options: Any) -> Stats:
        """Run this code on an emulated GPU, over CPU tensors, in place. Options and errors: ``emulator.emulate``.

        args: by parameter name, as ``Launch.args``, or the run-time parameters in order. Only sm_80 and sm_90 can be
        emulated. Raises ValueError for another target, for arguments that were not given, and for arguments that break
        a promise the code was compiled with: a tensor of another dtype, a value that is not divisible by 16, or not the
        constant compiled in.
        """
        if self.target.backend != "cuda" or self.target.arch not in EMULATED:
            known = ", ".join(f"sm_{arch}" for arch in EMULATED)
            raise ValueError(f"{self.target.name} cannot be emulated, only {known} can")
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        values = self._ordered(args)
        if 0 in grid:
            return Stats()
        options = {"shared": self.shared_bytes, "names": self.specialization.run_time, **options}
        return emulate(self.text, grid, self.num_warps, values, int(self.target.arch), **options)

    def _ordered(self, args: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
        names = self.specialization.run_time
        if not isinstance(args, Mapping):
            if len(args) != len(names):
                raise ValueError(
                    f"the compiled kernel takes {len(names)} arguments ({', '.join(names)}), not {len(args)}"
                )
            args = dict(zip(names, args, strict=True))
        missing = [name for name in names if name not in args]
        if missing:
            raise ValueError(f"arguments are missing: {', '.join(missing)}")
        places = {name: (i,) for i, name in enumerate(self.specialization.signature)}
        for name, value in args.items():
            if name not in places:
                raise ValueError(f"the kernel has no parameter {name!r}, only {', '.join(places)}")
            constant = self.specialization.constants.get(places[name], value)
            if not isinstance(constant, torch.Tensor) and constant != value:
                raise ValueError(f"{name} was compiled in as {constant!r}, not {value!r}")
        for name in names:
            required, found = self.specialization.signature[name], pointer_type(args[name])
            if required.startswith("*") and found not in (None, required):
                raise ValueError(f"{name} was compiled as {required}, and is {found}")
        for name in self.specialization.divisible() & set(names):
            value = args[name]
            if isinstance(value, torch.Tensor):
                value = value.storage_offset() * value.element_size()
            if int(value or 0) % 16:
                raise ValueError(f"{name} was promised to be divisible by 16, and is not")
        return [args[name] for name in names]

    @property
    def over_limits(self) -> list[str]:
        """In words, each limit of the target that the kernel breaks: then it cannot be launched there."""
        limits = (
            ("bytes of shared memory", self.shared_bytes, self.target.shared_bytes),
            ("registers", self.registers, self.target.registers),
        )
        return [f"{used} {what}, {self.target.name} has {most}" for what, used, most in limits if used > most]


def compile(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    config: Any,
    target: str | Target,
) -> Compiled:
    """Compile a ``@triton.jit`` function from types alone.

        compiled = compile(add, {"x": "*fp16:16", "count": "i32"}, {"BLOCK": 256}, Config(num_warps=4), "sm_90")

    signature: the type of each run-time parameter as Triton writes it, with ":16" where it is divisible by 16;
    parameters called "constexpr" may be among them. constants: values of all other parameters, unless they have a
    default. config: ``Config`` or anything else with ``num_warps``; of ``triton.Config`` and of a mapping the block
    sizes are constants too. target: of ``targets.TARGETS``, or Triton's ``GPUTarget`` for one of them.

    ``compile_launch`` derives the same from the arguments of a launch, as Triton's launcher would.
    Raises ValueError and TypeError for wrong arguments, which it names, and otherwise as ``compile_launch`` does.
    """
    found = find_target(target)
    sizes, config = _split_config(config)
    if twice := sorted(set(sizes) & set(constants)):
        raise ValueError(f"{', '.join(twice)}: given by the constants and by the config")
    special = parse_signature(kernel, signature, {**constants, **sizes}, found)
    return _compile(kernel, special, config.num_warps, config.num_stages, found)


def _split_config(config: Any) -> tuple[dict[str, Any], Config]:
    """(constants, the rest) of what ``compile`` takes for a config."""
    if isinstance(config, Mapping):
        sizes = dict(config)
        return sizes, Config(**{name: sizes.pop(name) for name in ("num_warps", "num_stages") if name in sizes})
    if not hasattr(config, "num_warps"):
        raise TypeError(f"a config has num_warps, {type(config).__name__} {config!r} has not")
    for name, default_decision in (("num_ctas", 1), ("maxnreg", None)):
        if getattr(config, name, default_decision) != default_decision:
            raise ValueError(f"a config with {name}={getattr(config, name)} cannot be compiled here")
    fixed = Config(config.num_warps, getattr(config, "num_stages", Config.num_stages))
    return dict(getattr(config, "kwargs", {})), fixed


def compile_launch(launch: Launch, target: str | Target) -> Compiled:
    """Compile ``launch`` for a target of ``targets.TARGETS``, specialised as launching it there would be.

    Raises ValueError for an unknown target or wrong arguments, FileNotFoundError where Triton came without
    ``cuobjdump``, and whatever Triton raises for a kernel that does not compile.
    """
    found = find_target(target)
    return _compile(launch.kernel, specialize(launch, found), launch.num_warps, launch.num_stages, found)


def emulate_launch(launch: Launch, target: str | Target, **options: Any) -> Stats:
    """Compile ``launch`` for sm_80 or sm_90 and run it there on an emulated GPU: ``Compiled.emulate``."""
    return compile_launch(launch, target).emulate(launch.grid, launch.args, **options)


def _compile(kernel: Any, special: Specialization, num_warps: int, num_stages: int, target: Target) -> Compiled:
    options = backend_of(target).parse_options({"num_warps": num_warps, "num_stages": num_stages})
    made = triton.compile(
        ASTSource(kernel, special.signature, special.constants, special.attributes),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=options.__dict__,
    )
    if target.backend == "cuda":
        text, binary = made.asm["ptx"], made.asm["cubin"]
        instructions = read_ptx(text)
        resources = read_resource_usage(_cuobjdump("--dump-resource-usage", binary))
    else:
        text, binary = made.asm["amdgcn"], made.asm["hsaco"]
        instructions, resources = read_amdgcn(text), read_amd_metadata(text)
    return Compiled(
        target=target,
        text=text,
        # Triton asks for shared memory at launch, so the binary does not say how much.
        resources=replace(resources, shared_bytes=made.metadata.shared),
        instructions=instructions,
        num_warps=made.metadata.num_warps,
        num_stages=made.metadata.num_stages,
        specialization=special,
        triton_version=triton.__version__,
        binary=binary,
    )


def find_cuobjdump() -> str:
    """``cuobjdump`` of the Triton package, else the one on PATH. Raises FileNotFoundError naming both places."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"cuobjdump is neither at {shipped} nor on PATH: registers and spills cannot be read")
    return found


def _cuobjdump(option: str, cubin: bytes) -> str:
    """What ``cuobjdump`` prints of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([find_cuobjdump(), option, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"cuobjdump failed with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout
