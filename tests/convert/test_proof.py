"""The first call with inputs of a shape is compared with what the layers give: wrong programs end, sound ones stay."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.convert.networks import Inception, SmallMobileNet, SmallResNet, SqueezeExcite, conv_bn, settled
from tests.convert.programs import network
from tilewright.convert.network import proof
from tilewright.convert.network.program import Program
from tilewright.kernels.cpu.replay import MOST_REPLAYS

SETTINGS = {"factor": 2.0}


class Fooled(nn.Module):
    """Reads a number from where no reader of its code looks."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = conv_bn(3, 8), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.block(x)) * SETTINGS["factor"])


class Unread(nn.Module):
    """Passes its input on, by code that is not read."""

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(autouse=True)
def _settings() -> None:
    SETTINGS["factor"] = 2.0


def picture(batch: int = 2, channels: int = 3, size: int = 10) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


def converted(model: nn.Module, recipe: str, x: torch.Tensor) -> nn.Module:
    return tw.convert_model(model, recipe, calibration_data=[x] if recipe == "int8" else None)


def program_of(model: nn.Module) -> Program:
    program = vars(model)["forward"]
    assert isinstance(program, Program)
    return program


@pytest.fixture(params=["fuse", "int8"])
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- wrong programs
def test_a_program_that_differs_ends_with_one_warning(
    recipe: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = settled(Fooled())
    small = converted(model, recipe, picture(8))
    SETTINGS["factor"] = 3.0
    with caplog.at_level(logging.WARNING, "tilewright"), torch.no_grad():
        for batch in (2, 2, 2, 3):
            x = picture(batch)
            expected, found = model(x), small(x)
            assert (found - expected).norm() < (1e-5 if recipe == "fuse" else 0.1) * expected.norm()
    (said,) = [each.getMessage() for each in caplog.records if "layer by layer" in each.getMessage()]
    assert said.startswith("Fooled runs layer by layer from now on: its graph does not compute what its layers do")
    reason = tw.report(small).untraced[""]
    assert "results differ by 0." in reason
    assert f"(root) does not trace: {reason}" in " ".join(str(tw.report(small)).split())
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301 (just pickled here)
        assert program_of(twin).refused == reason
    tw.save_model(small, tmp_path)
    loaded = tw.load_model(tmp_path, Fooled)
    assert tw.report(loaded).untraced == {"": reason} and "forward" not in vars(loaded)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("readable", [True, False])
def test_a_program_that_raises_where_its_layers_do_not_ends_too(
    readable: bool, recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Shaped(Fooled):
        def __init__(self) -> None:
            super().__init__()
            self.unread = nn.Identity() if readable else Unread()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.unread(super().forward(x)).reshape(int(SETTINGS["rows"]), -1)

    SETTINGS["rows"] = 3
    model = settled(Shaped())
    small = converted(model, recipe, picture(3, size=7))
    SETTINGS["rows"] = 2
    with caplog.at_level(logging.WARNING, "tilewright"), torch.no_grad():
        for _ in range(3):
            x = picture(2, size=7)
            expected, found = model(x), small(x)
            assert (found - expected).norm() < (1e-5 if recipe == "fuse" else 0.1) * expected.norm()
    (said,) = [each.getMessage() for each in caplog.records if "layer by layer" in each.getMessage()]
    assert "it raises RuntimeError: shape '[3, -1]' is invalid" in said
    with pytest.raises(ValueError, match="with 3 channels"):
        small(picture(2, channels=5))


def test_every_shape_is_looked_at(recipe: str) -> None:
    model = settled(Fooled())
    small = converted(model, recipe, picture(8))
    with torch.no_grad():
        for _ in range(3):
            small(picture())
    assert program_of(small).refused is None
    SETTINGS["factor"] = 3.0
    with torch.no_grad():
        x = picture(5)
        expected, found = model(x), small(x)
    assert (found - expected).norm() < (1e-5 if recipe == "fuse" else 0.1) * expected.norm()
    assert program_of(small).refused is not None


def test_gradients_are_right_from_the_first_call_on() -> None:
    model = settled(Fooled())
    small = tw.convert_model(model, "fuse")
    SETTINGS["factor"] = 3.0
    x = picture().requires_grad_()
    expected, found = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (model, small))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class FunctionalNorm(nn.Module):
    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.group_norm(x, num_groups=self.groups, weight=self.weight)


@pytest.mark.parametrize("norm", [nn.GroupNorm, FunctionalNorm])
def test_group_norms_of_large_means_keep_their_digits(norm: Any) -> None:
    """PyTorch's group norm of a channels-last image loses them: findings/torch_group_norm_channels_last.sh."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), norm(8, 32), nn.ReLU(), nn.Conv2d(32, 16, 3), norm(4, 16)).eval()
    with torch.no_grad():  # channels that are alike have a large mean in common where the picture has one
        model[0].weight.mul_(0.01).add_(0.2)
    exact, fused = copy.deepcopy(model).double(), tw.convert_model(model, "fuse")
    with torch.no_grad():
        small = picture(size=16)
        # The recording of the first calls, whose means are small, serves those whose means are large.
        for x in (small, small, small, small + 1000, small + 1000, small[:1] + 1000):
            expected = exact(x.double())
            assert (fused(x) - expected).norm() <= 2 * (model(x) - expected).norm()
    assert program_of(fused).refused is None


def test_what_the_program_wrote_to_its_input_is_taken_back() -> None:
    class Writes(Fooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(SETTINGS["factor"])
            return super().forward(x)

    model = settled(Writes())
    small = tw.convert_model(model, "fuse")
    SETTINGS["factor"] = 3.0
    for _ in range(2):
        x = picture()
        ours, theirs = x.clone(), x.clone()
        with torch.no_grad():
            torch.testing.assert_close(small(ours), model(theirs), rtol=1e-4, atol=1e-4)
        assert torch.equal(ours, theirs)


class Hides(Fooled):
    """Writes state where no reader of its code looks."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count_in(self)
        return super().forward(x)


COUNTS_FROM = {"start": False}


def count_in(module: Any) -> None:
    if COUNTS_FROM["start"]:
        module.count.add_(1)


def test_state_that_the_graph_knows_nothing_of_ends_it_and_counts_once() -> None:
    model = settled(Hides())
    COUNTS_FROM["start"] = False
    small = tw.convert_model(model, "fuse")
    COUNTS_FROM["start"] = True
    with torch.no_grad():
        for number in range(1, 4):
            small(picture())
            assert small.count == number
    assert "writes state" in str(program_of(small).refused)


# ---- sound programs
class Sharp(nn.Module):
    """Rounds, compares, divides and takes the largest: what a last bit may turn."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        y = F.relu(self.b(F.relu(self.a(x))))
        mask = (y > y.mean()).float()
        steps = torch.round(y * 1000) / 1000
        best, inverse = y.flatten(1).argmax(1), 1 / (y - y.mean())
        return {"mask": mask, "steps": steps, "best": best, "inverse": inverse, "zero": y - y}


class Deep(nn.Module):
    """Amplifies what it is given, layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(12))
        self.first = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.sin(20 * F.relu(layer(x)))
        return x


SOUND = {
    "resnet": (SmallResNet, 1),
    "mobilenet": (SmallMobileNet, 1),
    "squeeze": (SqueezeExcite, 12),
    "inception": (Inception, 12),
    "sharp": (Sharp, 3),
    "deep": (Deep, 3),
    "fooled not": (Fooled, 3),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_networks_go_on(name: str, recipe: str) -> None:
    kind, channels = SOUND[name]
    for seed in range(3):
        torch.manual_seed(seed)
        model = settled(kind())
        small = converted(model, recipe, picture(8, channels, 16))
        with torch.no_grad():
            for batch, size in ((1, 16), (5, 16), (3, 20), (3, 16)):
                for _ in range(3):
                    small(picture(batch, channels, size))
        assert program_of(small).refused is None
        assert name in ("sharp", "deep") or program_of(small)._replays.replays


@pytest.mark.parametrize("seed", range(30))
def test_sound_random_networks_go_on(seed: int, recipe: str) -> None:
    torch.manual_seed(seed)
    small = converted(network(seed), recipe, torch.randn(4, 8, 6, 6))
    with torch.no_grad():
        for shape in ((2, 8, 6, 6), (1, 8, 7, 5)):
            small(torch.randn(shape))
    assert not any(getattr(vars(part).get("forward"), "refused", None) for part in small.modules())


def test_narrow_floats_and_zeros_and_nan_are_no_difference() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        small = tw.convert_model(settled(SmallResNet()).to(dtype), "fuse")
        with torch.no_grad():
            for x in (torch.randn(2, 1, 16, 16), torch.zeros(3, 1, 16, 16)):
                small(x.to(dtype))
            if dtype == torch.float32:
                small(torch.full((4, 1, 16, 16), torch.nan))
        assert program_of(small).refused is None


def test_programs_that_draw_random_numbers_are_proven() -> None:
    class Drawing(Fooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x * torch.rand(1)).mean((2, 3)), 0.5, True)

    sound, wrong = (tw.convert_model(settled(Drawing()), "fuse") for _ in range(2))
    with torch.no_grad():
        sound(picture())
        SETTINGS["factor"] = 3.0
        wrong(picture())
    assert program_of(sound).refused is None
    assert "does not compute" in str(program_of(wrong).refused)


def test_the_kinds_of_inputs_that_are_remembered_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """But more than there are recordings; what is forgotten is proven again."""
    most = MOST_REPLAYS + 1
    monkeypatch.setattr("tilewright.convert.network.program.MOST_PROVEN", most)
    small = tw.convert_model(settled(Fooled()), "fuse")
    program = program_of(small)
    with torch.no_grad():
        for batch in range(1, most + 3):
            small(picture(batch))
        assert [kinds[0][0][0] for kinds in program._proven] == list(range(3, most + 3))
        SETTINGS["factor"] = 3.0
        small(picture(most))
        assert program.refused is None, "proven before"
        small(picture(1))
        assert program.refused is not None


def test_the_proof_has_no_side_effects() -> None:
    heard: list[int] = []
    model = settled(SmallMobileNet())
    small, x = tw.convert_model(model, "fuse"), picture(2, 1)
    small.register_forward_hook(lambda *_: heard.append(1))
    kept, numbers = x.clone(), torch.get_rng_state()
    state = {name: value.clone() for name, value in small.state_dict().items()}
    with torch.no_grad():
        small(x)
    assert heard == [1] and torch.equal(x, kept) and torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    seen: list[int] = []
    small.head.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        small(picture(3, 1))
    assert seen == [1], "a hook inside is heard once"


def test_it_stays_out_of_compilers_transformations_and_exports() -> None:
    model, x = settled(SmallResNet()), picture(2, 1, 16)
    small = tw.convert_model(model, "fuse")
    with torch.no_grad():
        torch._dynamo.reset()
        ways = torch.compile(small, fullgraph=True, backend="aot_eager"), torch.export.export(small, (x,)).module()
        for found in (*(way(x) for way in ways), torch.func.vmap(small)(x[None])[0]):
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
        with torch.device("meta"):
            assert small.to("meta")(x.to("meta")).is_meta


def test_two_inputs_that_are_one() -> None:
    class Two(Fooled):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            z = self.block(y)
            y -= 0.1 * x
            return F.relu(z).sum(1, keepdim=True) + y

    model = settled(Two())
    small = tw.convert_model(model, "fuse")
    for _ in range(3):
        ours, theirs = (x.clone() for x in [picture()] * 2)
        with torch.no_grad():
            torch.testing.assert_close(small(ours, ours), model(theirs, theirs), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, theirs)
    assert program_of(small).refused is None


# ---- the comparison
def test_differences() -> None:
    x = torch.randn(50)
    assert proof.difference(x, x.clone()) == 0 and proof.difference([x, None, 3], [x, None, 3]) == 0
    assert proof.difference(x, 2 * x) == pytest.approx(0.5)
    assert proof.difference(torch.zeros(3), torch.zeros(3)) == 0
    assert "structure" in str(proof.difference([x], (x,))) and "in place of" in str(proof.difference(x, x[:3]))
    assert "in place of" in str(proof.difference(x, x.double())) and "3 in place of 4" in str(proof.difference(3, 4))
    y = x.clone()
    y[0] = torch.nan
    assert proof.difference(y, x) == pytest.approx(1 / 50) and proof.difference(y, y.clone()) == 0
    assert proof.difference(torch.arange(4), torch.tensor([0, 1, 2, 4])) == pytest.approx(1 / 4)
    z = torch.complex(x, x)
    assert proof.difference(z, z.clone()) == 0 and proof.difference(z, z.conj()) > 1


def test_what_rounding_explains() -> None:
    def why(found: Any, run: Any, given: torch.Tensor) -> str | None:
        return proof.why_differs((found, (given,)), proof.outcome(run, (given,)), run, (given,))

    x = torch.randn(1000)
    assert why(x * (1 + 1e-6), lambda given: given[0], x) is None
    assert "differ by 0.01" in str(why(x * 1.01, lambda given: given[0], x))
    amplified = lambda given: torch.sin(100 * given[0])  # noqa: E731
    assert why(torch.sin(100 * (x + 1e-5)), amplified, x) is None
    assert why(torch.cos(100 * x), amplified, x) is not None
    assert why(x.half() * 1.001, lambda given: given[0].half(), x) is None


@torch.no_grad()
def test_the_trial_of_a_conversion_looks_at_two_samples_and_the_first_call_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, looked_at = picture(batch=5, channels=1, size=16), list[int]()
    compare = Program._why_wrong

    def watch(program: Program, found: Any, given: tuple[Any, ...]) -> str | None:
        looked_at.append(len(given[0]))
        return compare(program, found, given)

    monkeypatch.setattr(Program, "_why_wrong", watch)
    model = tw.convert_model(settled(SmallResNet()), "int8", calibration_data=[x])
    assert looked_at == [2]
    for _ in range(3):
        model(x)
    assert looked_at == [2, 5]
