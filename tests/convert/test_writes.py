"""What a network writes in place is seen by whoever sees it in PyTorch: other names, views, the caller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import tilewright as tw
from tests.convert.networks import settled, source_of
from tilewright.convert.graph import Untraceable, effect_of, settle
from tilewright.convert.network.program import Program


class Net(nn.Module):
    """Three convolutions, a batch-norm, an activation in place, and whatever ``code`` does with them."""

    def __init__(self, code: Callable[[Any, torch.Tensor], Any]):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm, self.act, self.code = nn.BatchNorm2d(8), nn.SiLU(inplace=True), code

    def forward(self, x: torch.Tensor) -> Any:
        return self.code(self, x)


def other_name(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    features = y
    y += m.b(F.relu(y))
    return F.relu(features)


def between(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.a(x)
    side = m.b(x)
    x = m.act(x)
    return F.relu(side) + m.c(x)


def residual_between(m: Net, x: torch.Tensor) -> torch.Tensor:
    r = m.a(x)
    y = m.b(x) + r
    r.mul_(3)
    return F.relu(y) * r


def padding_between(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    padded = F.pad(y, (0, 1, 0, 1))
    y.mul_(2)
    return m.b(padded)[..., :-1, :-1] + y


def view_before(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    flat = y.flatten(1)
    y.relu_()
    return flat.sum(1)


def through_a_view(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.a(x))
    y.view(-1).relu_()
    return m.b(y)


def a_slice(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = F.relu(m.a(x))
    y[:, :4] += 1
    y[:, 0] = 0
    return m.b(y)


def one_of_two_halves(m: Net, x: torch.Tensor) -> torch.Tensor:
    first, second = m.a(x).chunk(2, 1)
    first.mul_(2)
    return torch.cat([second, first], 1)


def out_argument(m: Net, x: torch.Tensor) -> torch.Tensor:
    y, z = m.a(x), m.b(x)
    torch.add(y, z, out=y)
    return F.relu(y) + z


def a_detached_name(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    same = y.detach()
    y.clamp_(-0.1, 0.1)
    return m.b(same)


def identity(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    same = F.dropout(y, 0.5, False)
    F.relu(y, inplace=True)
    return same + m.b(y)


CODE = {
    each.__name__: each
    for each in (
        *(other_name, between, residual_between, padding_between, view_before, through_a_view, a_slice),
        *(one_of_two_halves, out_argument, a_detached_name, identity),
    )
}


def agree(model: nn.Module, converted: nn.Module, within: float = 1e-5) -> None:
    """Call after call, also in what they leave of their input."""
    for batch in (2, 2, 2, 3, 2):
        x = torch.randn(batch, 8, 6, 7)
        ours, theirs = x.clone(), x.clone()
        with torch.no_grad():
            expected, found = model(theirs), converted(ours)
        torch.testing.assert_close(found, expected, rtol=within, atol=within * expected.abs().max().item() + 1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CODE)
def test_writes_are_seen_by_every_name(name: str) -> None:
    model = settled(Net(CODE[name]))
    agree(model, tw.convert_model(model, "fuse"))
    data = [torch.randn(8, 8, 6, 7)]
    converted = tw.convert_model(model, "int8", calibration_data=data)
    agree(model, converted, within=0.2)
    assert not any(getattr(vars(part).get("forward"), "refused", None) for part in converted.modules())


def test_what_is_moved_stays_fused() -> None:
    """A convolution is not computed where its activation stands if its input has changed by then; fused it is."""
    fused = tw.convert_model(settled(Net(between)), "fuse")
    assert "'relu'" in source_of(fused) and not tw.report(fused).untraced
    fused = tw.convert_model(settled(Net(residual_between)), "fuse")
    assert "y" not in tw.report(fused).untraced and ".run(x, run" in source_of(fused)


def test_the_report_says_what_is_written() -> None:
    untraced = tw.report(tw.convert_model(settled(Net(a_slice)), "fuse")).untraced
    assert untraced == {"": "forward writes over a value of which a view, or another name, is read afterwards"}


# ---- the caller's input
def normalises(m: Net, x: torch.Tensor) -> torch.Tensor:
    x.sub_(0.5).div_(2)
    return F.relu(m.norm(m.a(x)))


def activates(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.a(F.relu(x, inplace=True)))


def after_a_convolution(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    x *= 0.5
    return F.relu(y) + m.b(x)


def a_part(m: Net, x: torch.Tensor) -> torch.Tensor:
    x[:, 1] = 0
    return m.norm(m.a(x))


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
@pytest.mark.parametrize("code", [normalises, activates, after_a_convolution, a_part])
def test_the_input_is_changed_as_often_as_in_pytorch(code: Any, recipe: str) -> None:
    model = settled(Net(code))
    data = [torch.randn(8, 8, 6, 7)]
    kept = data[0].clone()
    converted = tw.convert_model(model, recipe, calibration_data=data if recipe == "int8" else None)
    assert torch.equal(data[0], kept), "calibration leaves its data alone"
    agree(model, converted, within=1e-5 if recipe == "fuse" else 0.2)
    agree(model, copy.deepcopy(converted), within=1e-5 if recipe == "fuse" else 0.2)


def test_two_names_of_one_input() -> None:
    class Two(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x -= 1
            return F.relu(self.a(x)) + self.b(y)

    model = settled(Two(other_name))
    fused = tw.convert_model(model, "fuse")
    for _ in range(4):
        x, y = torch.randn(2, 8, 6, 7), torch.randn(2, 8, 6, 7)
        with torch.no_grad():
            torch.testing.assert_close(fused(x.clone(), y), model(x.clone(), y), rtol=1e-5, atol=1e-5)
            once, again = x.clone(), x.clone()
            torch.testing.assert_close(fused(once, once), model(again, again), rtol=1e-5, atol=1e-5)


# ---- code that cannot be read
class Unreadable(nn.Module):
    """Branches on a value. may: what it does to its argument."""

    def __init__(self, may: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.may = may

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.mean() > 100 else self.may(x)


@pytest.mark.parametrize("may", [lambda x: x.mul_(0.5), lambda x: x, lambda x: x.detach(), lambda x: x * 2])
def test_what_cannot_be_read_may_write_to_its_argument_and_keep_it(may: Any) -> None:
    class Around(Net):
        def __init__(self) -> None:
            super().__init__(other_name)
            self.inner = Unreadable(may)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            side, before = self.b(y), y.detach()
            z = self.inner(y)
            z += 0.1
            return F.relu(side) + self.c(y) + F.relu(z) + before

    model = settled(Around())
    agree(model, tw.convert_model(model, "fuse"))


def test_a_hook_s_tensor_is_overwritten_as_before() -> None:
    class Hooked(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.act(self.norm(self.a(x))))

    kept: list[torch.Tensor] = []
    model, x = settled(Hooked(other_name)), torch.randn(2, 8, 6, 7)
    fused = tw.convert_model(model, "fuse")
    for each in (model, fused):
        each.norm.register_forward_hook(lambda module, args, y: kept.append(y))
    with torch.no_grad():
        for _ in range(3):
            model(x), fused(x)
            torch.testing.assert_close(kept[-1], kept[-2], rtol=1e-4, atol=1e-5)


# ---- what is known of operators
def graph_of(function: Any, *arguments: Any, method: bool = False, **options: Any) -> fx.Node:
    graph = fx.Graph()
    nodes = tuple(graph.placeholder("xyz"[i]) if each is None else each for i, each in enumerate(arguments))
    return graph.call_method(function, nodes, options) if method else graph.call_function(function, nodes, options)


IMAGE = torch.randn(2, 4, 6, 6)
FRESH: tuple[Any, ...] = (
    *(
        torch.relu,
        F.relu,
        F.gelu,
        torch.sigmoid,
        F.softmax,
        torch.abs,
        torch.cumsum,
        torch.clone,
        F.normalize,
        F.avg_pool2d,
    ),
    *(
        F.adaptive_avg_pool2d,
        F.max_pool2d,
        F.interpolate,
        torch.mean,
        torch.sum,
        F.pad,
        torch.clamp,
        torch.roll,
        torch.sort,
    ),
)
EXTRA = {
    F.softmax: (1,),
    torch.cumsum: (1,),
    F.avg_pool2d: (1,),
    F.adaptive_avg_pool2d: (6,),
    F.max_pool2d: (1,),
    F.interpolate: ((6, 6),),
    F.pad: ((0, 0),),
    torch.clamp: (-9.0, 9.0),
    torch.roll: (0,),
}


@pytest.mark.parametrize("function", FRESH, ids=lambda f: f.__name__)
def test_what_is_said_to_be_new_memory_is(function: Any) -> None:
    effect = effect_of(graph_of(function, None, *EXTRA.get(function, ())), {})
    assert not effect.shares and not effect.writes and not effect.unknown
    result = function(IMAGE, *EXTRA.get(function, ()))
    for tensor in [result] if isinstance(result, torch.Tensor) else result:
        assert tensor.untyped_storage().data_ptr() != IMAGE.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "name, arguments",
    [
        *(
            ("view", (-1,)),
            ("reshape", (-1,)),
            ("flatten", ()),
            ("transpose", (1, 2)),
            ("contiguous", ()),
            ("float", ()),
        ),
        *(
            ("to", (torch.float32,)),
            ("detach", ()),
            ("squeeze", ()),
            ("chunk", (2,)),
            ("expand", (2, 4, 6, 6)),
            ("unbind", ()),
        ),
        *(
            ("type_as", (IMAGE,)),
            ("view_as", (IMAGE,)),
            ("unfold", (3, 2, 1)),
            ("movedim", (1, 2)),
            ("narrow", (1, 0, 2)),
        ),
    ],
)
def test_what_may_be_a_view_is_said_to_be_one(name: str, arguments: tuple[Any, ...]) -> None:
    assert effect_of(graph_of(name, None, *arguments, method=True), {}).shares
    result = getattr(IMAGE, name)(*arguments)
    first = result if isinstance(result, torch.Tensor) else result[0]
    assert first.untyped_storage().data_ptr() == IMAGE.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "node",
    [
        *(graph_of("add_", None, None, method=True), graph_of(torch.relu_, None), graph_of(F.relu, None, inplace=True)),
        *(
            graph_of(F.relu, None, True),
            graph_of(F.hardtanh, None, 0.0, 6.0, True),
            graph_of("requires_grad_", None, method=True),
        ),
        graph_of(torch.ops.aten.add_.Tensor, None, None),
    ],
    ids=["add_", "relu_", "inplace=True", "inplace by place", "hardtanh", "requires_grad_", "aten.add_"],
)
def test_what_writes_is_said_to(node: fx.Node) -> None:
    assert effect_of(node, {}).writes == (node.args[0],)


def test_functions_of_others_may_do_anything() -> None:
    node = graph_of(lambda x: x, None)
    assert effect_of(node, {}).unknown and effect_of(node, {}).shares == (node.args[0],)
    assert not effect_of(graph_of(F.dropout, None, 0.5, False), {}).writes
    assert effect_of(graph_of(F.batch_norm, None, None, None, training=True), {}).writes


def test_a_graph_of_which_the_order_cannot_be_told_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.neg, (x,))
    flat = graph.call_method("view", (y, -1))
    graph.call_method("relu_", (y,))
    graph.output(flat)
    with pytest.raises(Untraceable, match="a view, or another name"):
        settle(graph, {})


def test_a_program_that_writes_to_its_input_is_not_replayed() -> None:
    fused = tw.convert_model(settled(Net(normalises)), "fuse")
    program = vars(fused)["forward"]
    assert isinstance(program, Program) and not program.whole
    with torch.no_grad():
        for _ in range(3):
            fused(torch.randn(2, 8, 6, 7))
    assert program._replays is not None and not program._replays.replays
    assert "writes to what the recorded function did not make" in str(program._replays.why_not)
