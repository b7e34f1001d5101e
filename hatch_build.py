"""Build hook: compiles the C kernels for the CPU into the package, where there is a compiler.

Without one the package works and is slower: `tilewright.kernels.cpu.native.why_no_native()` says so.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _load_builder(root: Path) -> Any:
    # By its path: importing the package would need torch, which a build environment does not have.
    spec = importlib.util.spec_from_file_location("build_kernels", root / "tilewright" / "kernels" / "cpu" / "build.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("tilewright/kernels/cpu/build.py is missing from the source tree")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CustomBuildHook(BuildHookInterface):
    """Adds the compiled library to wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; on failure warn and go on with a pure Python wheel."""
        if self.target_name != "wheel":
            return
        builder = _load_builder(Path(self.root))
        try:
            built = [builder.build(), builder.build_eager()]
        except builder.BuildError as error:
            self.app.display_warning(f"The C kernels were not built, the CPU path will be slower: {error}")
            builder.LIBRARY.unlink(missing_ok=True)
            builder.EAGER.unlink(missing_ok=True)
            return
        build_data["artifacts"] += [str(library.relative_to(self.root)) for library in built if library is not None]
        build_data["pure_python"] = False
        # Neither Python's nor PyTorch's version matters to a library with a plain C interface, nor Python's to a module
        # that keeps to its limited one.
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
