"""Some threads call a model while another gives it other weights, as a server does that reloads.

What PyTorch promises: no call fails; a call that begins when all weights are in answers with all of them; one that runs
meanwhile reads each tensor before or after its change. A tensor that is exchanged is the old or the new one to every
call, never a part of both.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewright as tw
from tests.contracts.changes import other_values
from tests.contracts.layers import LAYERS, K
from tests.convert.networks import SmallMobileNet, SmallResNet, settled
from tilewright.convert.network import proof
from tilewright.kernels.cpu import native
from tilewright.kernels.cpu.replay import Replay, Replays

Case = tuple[nn.Module, torch.Tensor]


def _layer(layer: Any) -> Case:
    return nn.Sequential(layer.make()).eval(), torch.randn(3, K)


def _network(kind: Callable[[], nn.Module], recipe: str) -> Case:
    x = torch.randn(2, 1, 12, 12)
    return tw.convert_model(settled(kind()), recipe, calibration_data=[x]), x


CASES: dict[str, Callable[[], Case]] = {
    **{layer.name: lambda layer=layer: _layer(layer) for layer in LAYERS},  # type: ignore[misc]
    **{
        f"{kind.__name__}-{recipe}": lambda kind=kind, recipe=recipe: _network(kind, recipe)  # type: ignore[misc]
        for kind in (SmallResNet, SmallMobileNet)
        for recipe in ("fuse", "int8")
    },
}


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Threads take turns so often that they meet in the middle of things, and use one processor each."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


@contextmanager
def called_meanwhile(call: Callable[[], object], threads: int = 2) -> Iterator[None]:
    """``call`` again and again in other threads; what it raises there is raised here."""
    errors: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                call()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    if errors:
        raise errors[0]


def _answer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = model(x)
    return y


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("name", CASES)
def test_weights_are_loaded_while_others_call(name: str, assign: bool) -> None:
    model, x = CASES[name]()
    states = [copy.deepcopy(model.state_dict())]
    states.append({key: other_values(tensor) for key, tensor in states[0].items()})
    expected = []
    for state in states:
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(state)
        expected.append(_answer(fresh, x))
    scale = (expected[0] - expected[1]).abs().max()

    with called_meanwhile(lambda: _answer(model, x)):
        for turn in range(20):
            which = turn % 2
            state = {key: tensor.clone() for key, tensor in states[which].items()} if assign else states[which]
            model.load_state_dict(state, assign=assign)
            for _ in range(3):
                assert (_answer(model, x) - expected[which]).abs().max() < 1e-3 * scale


@pytest.mark.parametrize("name", ["int8", "int4", "int8-static", "SmallResNet-fuse", "SmallResNet-int8"])
def test_a_tensor_that_is_exchanged_is_the_old_or_the_new_one(name: str) -> None:
    model, x = CASES[name]()
    layer = next(module for module in model.modules() if getattr(module, "bias", None) is not None)
    biases = [layer.bias.detach().clone() + shift for shift in (0.0, 5.0)]
    expected = []
    for bias in biases:
        layer.bias = nn.Parameter(bias)
        expected.append(_answer(copy.deepcopy(model), x))
    scale = (expected[0] - expected[1]).abs().max()
    assert scale > 0

    def call() -> None:
        y = _answer(model, x)
        assert min((y - each).abs().max() for each in expected) < 1e-3 * scale

    with called_meanwhile(call):
        for turn in range(200):
            layer.bias = nn.Parameter(biases[turn % 2].clone())


# ---- where threads meet, one meeting at a time
def _elsewhere(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


needs_kernels = pytest.mark.skipif(native.why_no_native() is not None, reason=f"needs C kernels: {native._load()[1]}")


def _replays() -> tuple[Replays, list[torch.Tensor], torch.Tensor, list[Callable[[], None]]]:
    """A recorded convolution; its weight, to be exchanged; its input; what is done once when it is next run."""
    weights = [torch.randn(8, 3, 3, 8)]
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    meanwhile: list[Callable[[], None]] = []

    def function(image: torch.Tensor) -> torch.Tensor:
        y = torch.ops.tilewright.conv2d_fused(image, weights[0], None, None, [1, 1], [1, 1, 1, 1])
        if meanwhile:
            meanwhile.pop()()
        return y

    return Replays(function, tensors=lambda: weights), weights, x, meanwhile


@needs_kernels
@torch.no_grad()
def test_what_was_recorded_of_an_old_weight_is_not_kept_for_the_new_one() -> None:
    fast, weights, x, meanwhile = _replays()

    def exchange() -> None:
        weights[0] = torch.randn(8, 3, 3, 8)
        _elsewhere(lambda: fast(x))

    fast(x)
    meanwhile.append(lambda: _elsewhere(exchange))
    fast(x)
    expected = fast.function(x)
    for _ in range(4):
        torch.testing.assert_close(fast(x), expected)
    assert fast.replays, fast.why_not


@needs_kernels
@torch.no_grad()
def test_two_threads_find_the_same_recording_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _, x, _ = _replays()
    expected = fast.function(x)
    for _ in range(3):
        fast(x)
    both = threading.Barrier(2)

    def is_current(replay: Replay) -> bool:
        both.wait(10)
        return False

    monkeypatch.setattr(Replay, "is_current", is_current)
    results: list[torch.Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.append(fast(x))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        torch.testing.assert_close(result, expected)


# ---- the proof of a program, which runs its layers as well
class OwnState(SmallMobileNet):
    """Holds a parameter and a buffer itself, as models with position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 1, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 1, 1, 1))
        self.facts = {"calls": [1, 2]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale + self.shift)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("when", ["before", "after", "every"])
def test_weights_that_come_while_a_program_is_proven(
    when: str, assign: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They stay, and a difference that comes of them is not held against the program."""
    x = torch.randn(2, 1, 12, 12)
    model = tw.convert_model(settled(OwnState()), "fuse")
    new = {key: other_values(tensor) for key, tensor in model.state_dict().items()}
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(new)
    expected, plainly, left = _answer(fresh, x), proof.outcome, [1]

    def outcome(run: proof.Run, given: tuple[Any, ...]) -> Any:
        def load() -> None:
            state = {key: tensor.clone() for key, tensor in new.items()}
            model.load_state_dict(state, assign=assign)

        if when in ("before", "every") and left:
            left.clear()
            _elsewhere(load)
        result = plainly(run, given)
        if when == "every" or left:
            left.clear()
            _elsewhere(load)
        return result

    monkeypatch.setattr(proof, "outcome", outcome)
    _answer(model, x)
    monkeypatch.undo()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, new[key]), key
    for _ in range(4):
        torch.testing.assert_close(_answer(model, x), expected, rtol=1e-4, atol=1e-5)
    program = vars(model)["forward"]
    assert program.refused is None and not caplog.records
    assert program._replays.replays or native.why_no_native()


class Drawing(SmallMobileNet):
    """Drops numbers in eval mode too, as a network does that is asked several times how sure it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x + 0.1 * torch.rand_like(x)), 0.5, True)


@pytest.mark.parametrize("recipe", ["fuse", "int8"])
@pytest.mark.parametrize("kind", [SmallMobileNet, Drawing])
def test_random_numbers_go_on_while_a_program_is_proven(
    kind: type[nn.Module], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread draws what it would have drawn had the program not been proven."""
    model, x = _network(kind, recipe)
    x = torch.cat([x, x])  # of a shape that it has not been called on
    drawn: list[torch.Tensor] = []
    plainly = proof.outcome

    def outcome(run: proof.Run, given: tuple[Any, ...]) -> Any:
        result = plainly(run, given)
        _elsewhere(lambda: drawn.append(torch.rand(4)))
        return result

    monkeypatch.setattr(proof, "outcome", outcome)
    torch.manual_seed(0)
    answer = _answer(model, x)
    assert drawn and vars(model)["forward"].refused is None
    drawn.append(torch.rand(4))
    torch.manual_seed(0)
    torch.testing.assert_close(_answer(model, x), answer, rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.rand(4 * len(drawn)), torch.cat(drawn))
