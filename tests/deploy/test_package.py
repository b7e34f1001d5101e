"""Programs and packages that are saved here and run in a process that knows nothing of this one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tilewright as tw
from bench.tables.compile_modes import Residual
from tests.deploy.test_onnx import layers
from tilewright.deploy.package import plain
from tilewright.kernels.dispatch.card import cards

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler, and there is none")
RUNNER = Path(__file__).with_name("run_package.cpp")


#: One of each format of linear layers.
RECIPES = [
    "int8",
    "int8-weight-only",
    "int4-g32",
    "int8-int4-g32",
    "int8-static",
    "sparse24",
    "sparse24-int8",
    "sparse24-int4",
]


def python(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "recipe, options",
    [*((recipe, {}) for recipe in RECIPES), ("int4-g32", {"keep_dequantized": True})],
    ids=[*RECIPES, "int4-g32, kept"],
)
def test_without_our_operators_a_program_computes_the_same(recipe: str, options: dict[str, bool]) -> None:
    data = [torch.randn(8, 96)] if recipe == "int8-static" else None
    model = tw.convert_model(layers(), recipe, calibration_data=data, **options)
    batch = torch.export.Dim("batch", min=1)
    x = torch.randn(5, 96)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 96),), dynamic_shapes=({0: batch},))
        program = program.run_decompositions(plain.decompositions())
        assert not [node for node in program.graph.nodes if "tilewright" in str(node.target)]
        # A product in float64 would be exact, and slow.
        nodes = [node for node in program.graph.nodes if re.search("mm|matmul|linear", str(node.target))]
        products = {node.meta["val"].dtype for node in nodes if node.op == "call_function"}
        assert products and torch.float64 not in products
        torch.testing.assert_close(program.module()(x), model(x), rtol=0.02, atol=0.01)


def test_without_our_operators_no_int8_product_has_one_row() -> None:
    """With the stride that Inductor gives a single row, PyTorch's operator leaves its result unwritten."""
    model, x = tw.convert_model(layers(), "int8"), torch.randn(1, 1, 96)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions(plain.decompositions())
        rows = [node.args[0].meta["val"].shape[0] for node in program.graph.nodes if "_int_mm" in str(node.target)]
        assert rows and min(rows) > 1
        torch.testing.assert_close(program.module()(x), model(x), rtol=0.02, atol=0.01)


@needs_compiler
@pytest.mark.slow
def test_a_package_of_one_token_computes_the_same(tmp_path: Path) -> None:
    model, x = tw.convert_model(layers(), "int8"), torch.randn(1, 1, 96)
    with torch.no_grad():
        expected = model(x)
        tw.export_package(model, tmp_path / "model.pt2", x, dynamic_batch=False)
        found = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))(x)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
def test_without_our_operators_convolutions_compute_the_same(recipe: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = tw.convert_model(Residual().eval(), recipe, calibration_data=[x] if recipe == "int8" else None)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions(plain.decompositions())
        assert not [node for node in program.graph.nodes if "tilewright" in str(node.target)]
        expected = model(x)
        torch.testing.assert_close(program.module()(x), expected, rtol=0.01, atol=0.01 * expected.abs().max().item())


def test_every_operator_has_a_plain_form() -> None:
    known = {str(op).removeprefix("tilewright.").removesuffix(".default") for op in plain.decompositions()}
    assert {card.name for card in cards()} <= known


def test_an_exported_program_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model, x = tw.convert_model(layers(), "int4-g32"), torch.randn(4, 96)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 96),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        torch.export.save(program, tmp_path / "program.pt2")
        torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    python(
        "import sys, torch, tilewright\n"
        "run = torch.export.load(sys.argv[1] + '/program.pt2').module()\n"
        "data = torch.load(sys.argv[1] + '/data.pt')\n"
        "assert torch.equal(run(data['x']), data['y'])\n",
        str(tmp_path),
    )


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("standalone", [True, False])
@pytest.mark.parametrize("recipe", ["int8", "int4-g32"])
def test_a_package_runs_in_a_fresh_process(recipe: str, standalone: bool, tmp_path: Path) -> None:
    model, x = tw.convert_model(layers(), recipe), torch.randn(7, 96)
    path = tmp_path / "model.pt2"
    written = tw.export_package(model, path, torch.randn(2, 96), standalone=standalone)
    assert written.bytes == path.stat().st_size and written.path == path
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    python(
        f"import sys, torch\n{'' if standalone else 'import tilewright'}\n"
        "run = torch._inductor.aoti_load_package(sys.argv[1] + '/model.pt2')\n"
        "data = torch.load(sys.argv[1] + '/data.pt')\n"
        "torch.testing.assert_close(run(data['x']), data['y'], rtol=0.02, atol=0.01)\n"
        f"assert ('tilewright' in sys.modules) != {standalone}\n",
        str(tmp_path),
    )


@needs_compiler
@pytest.mark.slow
def test_a_package_runs_without_python(tmp_path: Path) -> None:
    """A C++ program that links PyTorch's libraries but not Python's."""
    model, x = tw.convert_model(layers(), "int8"), torch.randn(7, 96)
    tw.export_package(model, tmp_path / "model.pt2", torch.randn(2, 96))
    with torch.no_grad():
        expected = model(x)
    (tmp_path / "x.bin").write_bytes(x.numpy().tobytes())
    root = Path(torch.__file__).parent
    includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    links = [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    program = str(tmp_path / "run_package")
    command = [str(COMPILER), "-std=c++20", "-O0", abi, *includes, str(RUNNER), "-o", program, *links]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run(
        [program, str(tmp_path / "model.pt2"), str(tmp_path / "x.bin"), "7", "96", str(tmp_path / "y.bin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.frombuffer(bytearray((tmp_path / "y.bin").read_bytes()), dtype=torch.float32).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_bad_arguments_of_a_package_are_named(tmp_path: Path) -> None:
    model = tw.convert_model(layers(), "int8")
    with pytest.raises(ValueError, match=r"\.pt2"):
        tw.export_package(model, tmp_path / "model.onnx", torch.randn(2, 96))
    with pytest.raises(ValueError, match="training mode"):
        tw.export_package(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model.pt2", torch.randn(2, 2))
