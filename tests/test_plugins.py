"""What CONTRIBUTING says about adding things is so: its blocks, word for word, are a package of somebody else's, which
is installed in a folder of the test and used in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(# (my_package/\w+\.py)\n.*?)^```$", re.DOTALL | re.MULTILINE)
COMMON = """
import tempfile
from pathlib import Path

import torch
from torch import nn

import tilewright as tw
from tilewright.kernels.dispatch.router import Problem, load_plugin, route

load_plugin("my_package")
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).eval()
x = torch.randn(5, 64)


def reloaded(small):
    with tempfile.TemporaryDirectory() as folder:
        tw.save_model(small, folder)
        make = lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        return tw.load_model(folder, make).eval()
"""
USES = {
    "activation": """
from my_package.activation import SquaredReLU

model = nn.Sequential(nn.Linear(64, 128), SquaredReLU(), nn.Linear(128, 32)).eval()
small = tw.convert_model(model, "int8", progress=False)
assert small[0].activation == "squared_relu"
torch.testing.assert_close(small(x), model(x), rtol=0.1, atol=0.1)
y = x.clone().requires_grad_()
small[0](y).sum().backward()
z = nn.functional.linear(x, small[0].dequantize_weight(), small[0].bias)
torch.testing.assert_close(y.grad, (2 * z.relu()) @ small[0].dequantize_weight(), rtol=1e-3, atol=1e-3)
""",
    "scheme": """
from my_package.scheme import BySize

recipe = tw.Recipe([("*", BySize(limit=5000))])
assert tw.Recipe.from_json(recipe.to_json()) == recipe
small = tw.convert_model(model, recipe, heads=True, progress=False)
assert [type(small[i]).__name__ for i in (0, 2)] == ["Int4Linear", "Int8Linear"]
assert "BySize" in str(tw.report(small))
assert torch.equal(reloaded(small)(x), small(x))
""",
    "format": """
from my_package.format import PowersOfTwoLinear, PowersOfTwoWeight

small = tw.convert_model(model, PowersOfTwoWeight(), heads=True, progress=False)
assert type(small[0]) is PowersOfTwoLinear
assert torch.equal(small[0].weight_scale.log2(), small[0].weight_scale.log2().round())
torch.testing.assert_close(small(x), model(x), rtol=0.05, atol=0.05)
assert "w8a16-powers-of-two" in str(tw.report(small))
loaded = reloaded(small)
assert type(loaded[0]) is PowersOfTwoLinear and torch.equal(loaded(x), small(x))
reverted = tw.revert_model(small)
torch.testing.assert_close(reverted[0].weight, model[0].weight, rtol=0, atol=0.01)
""",
    "checkpoint": """
import numpy

for folder in map(Path, (tempfile.mkdtemp(), tempfile.mkdtemp())):
    state = model.state_dict()
    if "wrong" in globals():
        state["0.bias"] = state["0.bias"][:3]
    numpy.savez(folder / "weights.npz", **{name: value.numpy() for name, value in state.items()})
    make = lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    try:
        assert torch.equal(tw.load_model(folder, make)(x), model(x))
    except tw.CheckpointError as error:
        assert "wrong" in globals() and "weights.npz" in str(error) and "0.bias" in str(error)
    else:
        assert "wrong" not in globals()
    wrong = True
with tempfile.TemporaryDirectory() as empty:
    try:
        tw.load_model(empty, make)
    except tw.CheckpointError as error:
        assert "tilewright.json" in str(error)
    else:
        raise AssertionError("an empty folder was read")
""",
    "implementation": """
small = tw.convert_model(model, "int8", progress=False)
three, four = small[0].problem(3), small[0].problem(4)
assert route(three).name == "three rows"
assert ("three rows", "takes three rows alone") in route(four).declined
torch.testing.assert_close(small(x[:3]), small(x)[:3], rtol=1e-5, atol=1e-5)
""",
    "operator": """
from tilewright.kernels.dispatch.card import card_of, make_arguments

assert torch.equal(torch.ops.tilewright.twice(x), 2 * x)
assert torch.equal(torch.compile(torch.ops.tilewright.twice, backend="eager", fullgraph=True)(x), 2 * x)
arguments = make_arguments(card_of("twice").example)
assert torch.equal(torch.ops.tilewright.twice(**arguments), 2 * arguments["x"])
try:
    torch.ops.tilewright.twice(torch.ones(3, dtype=torch.int64))
except TypeError as error:
    assert "twice: x must be float" in str(error)
else:
    raise AssertionError("integers were taken")
""",
}


def blocks() -> dict[str, str]:
    """File -> source of the package in CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {name: source for source, name in BLOCK.findall(text)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package as pip would install it, entry point included."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "my_package").mkdir()
    for name, source in blocks().items():
        (folder / name).write_text(source, encoding="utf-8")
    about = folder / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[tilewright.kernels]\nmy_package = my_package:load\n")
    return folder


@pytest.mark.parametrize("added", USES)
def test_what_contributing_adds_works(added: str, installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", COMMON + USES[added]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_every_block_is_used() -> None:
    assert set(blocks()) == {"my_package/__init__.py", *(f"my_package/{added}.py" for added in USES)}


def test_nothing_is_loaded_unless_it_is_asked_for(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    code = "import sys, tilewright; print([name for name in sys.modules if name.startswith('my_package')])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"
