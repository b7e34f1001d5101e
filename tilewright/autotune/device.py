"""Which machine a measurement holds for: the kind of device that names a table, and the software beside it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class DeviceKind:
    """name: as the driver or the operating system has it. arch: "sm_90", "gfx942", or a CPU's instruction sets. units:
    multiprocessors; on a CPU 0, for any number of threads. driver: its version; of PyTorch on a CPU.
    """

    name: str
    arch: str
    units: int
    driver: str = ""

    @property
    def is_cpu(self) -> bool:
        """Whether it is a CPU, which other processes share."""
        return self.arch.startswith("cpu-")

    @property
    def slug(self) -> str:
        """Part of a file name: all that tells two tables apart."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.name} {self.arch} x{self.units}".lower()).strip("-")


def _search(path: str, pattern: str) -> re.Match[str] | None:
    """Where a file of the system has the pattern; None if nowhere, or it cannot be read."""
    try:
        return re.search(pattern, Path(path).read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        return None


@functools.cache
def _cpu_name() -> str:
    found = _search("/proc/cpuinfo", r"^model name\s*:\s*(.+)$")
    return found[1].strip() if found else platform.processor() or platform.machine()


def cpu_kind(instructions: str = "") -> DeviceKind:
    """This CPU. instructions: those that kernels of ours use beside PyTorch's. What is chosen holds for any number of
    threads, so that results do not depend on it.
    """
    capability = torch.backends.cpu.get_cpu_capability().lower()
    arch = "-".join(filter(None, ("cpu", capability, instructions)))
    return DeviceKind(_cpu_name(), arch, 0, f"torch {torch.__version__}")


@functools.cache
def driver_version() -> str:
    """Of the GPU driver, as the kernel module says, or what CUDA knows of it."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if found := _search(path, r"\d+\.\d+(?:\.\d+)?"):
            return found[0]
    try:
        return f"cuda {getattr(torch._C, '_cuda_getDriverVersion')()}"  # noqa: B009  (private, and not in its stubs)
    except (AttributeError, RuntimeError):
        return "unknown"


@functools.cache
def triton_version() -> str:
    """Of Triton, "none" where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return "none"
    import triton

    return str(triton.__version__)


@functools.cache
def source_hash(*modules: str) -> str:
    """Of the source of ``modules`` (a package: of all its files): a kernel that changed must be timed anew."""
    digest = hashlib.sha256()
    for module in modules:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"module {module} has no source")
        home = Path(spec.origin)
        files = sorted(home.parent.rglob("*.[pch]*")) if home.name == "__init__.py" else [home]
        for file in files:
            if file.suffix in (".py", ".c", ".h"):
                digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
