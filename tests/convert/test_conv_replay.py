"""A converted network whose calls are recorded and replayed on a CPU answers as it does without, whatever comes in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import SmallMobileNet, SmallResNet, settled
from tilewright.convert.network.program import Program
from tilewright.kernels.cpu import steps as conv_steps
from tilewright.kernels.cpu.recording import recorded
from tilewright.kernels.cpu.replay import Replay, Replays

reason = conv_steps.why_no_kernels()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(params=["fuse", "int8"])
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[SmallResNet, SmallMobileNet], ids=["resnet", "mobilenet"])
def network(request: pytest.FixtureRequest, recipe: str) -> nn.Module:
    torch.manual_seed(0)
    model = settled(request.param())
    return tw.convert_model(model, recipe, calibration_data=[image(8)] if recipe == "int8" else None)


def image(batch: int, size: int = 16, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


def plainly(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the program computes without a recording: with gradients on there is none."""
    with torch.enable_grad():
        return model(x).detach()


def replays(model: nn.Module) -> list[Replay]:
    program = vars(model)["forward"]
    assert isinstance(program, Program) and program._replays is not None
    return program._replays.replays


def agrees(model: nn.Module, x: torch.Tensor, calls: int = 4) -> None:
    expected = plainly(model, x)
    with torch.no_grad():
        for _ in range(calls):
            y = model(x)
            assert y.shape == expected.shape and y.dtype == expected.dtype
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "images after the first": lambda x: x[3:],
    "every other image": lambda x: x[::2],
    "a crop": lambda x: x[:, :, 2:-1, 3:],
    "transposed": lambda x: x.transpose(2, 3),
    "flipped": lambda x: x.flip(3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "one image for all": lambda x: x[:1].expand(5, -1, -1, -1),
    "one image": lambda x: x[4:5],
    "no image": lambda x: x[:0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(network: nn.Module, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    agrees(network, view(image(8)))


def test_the_third_call_of_a_shape_is_replayed_and_others_are_not_mistaken_for_it(network: nn.Module) -> None:
    for _ in range(4):
        for batch, size in ((2, 16), (3, 16), (2, 20)):
            agrees(network, image(batch, size), calls=1)
    assert len(replays(network)) == 3
    offset = image(9)
    for first in (0, 2, 5):  # of the same shape and strides, but another place in their memory
        agrees(network, offset[first : first + 4], calls=3)


def test_results_are_the_caller_s_own(network: nn.Module) -> None:
    x, z = image(2), image(2)
    with torch.no_grad():
        for _ in range(3):
            network(x)
        y, expected = network(x), plainly(network, x)
        network(z)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.zero_()
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_written_to_is_read_anew(network: nn.Module) -> None:
    x = image(2)
    agrees(network, x)
    assert replays(network)
    parameter = next(p for p in [*network.parameters(), *network.buffers()] if p.is_floating_point() and p.numel() > 1)
    before = plainly(network, x)
    with torch.no_grad():
        parameter.mul_(1.5)
    assert not torch.allclose(plainly(network, x), before)
    agrees(network, x)
    network.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()}, assign=True)
    agrees(network, x)


def test_not_a_number_comes_out_where_it_went_in(network: nn.Module, recipe: str) -> None:
    x = image(3)
    agrees(network, x)
    x[1] = torch.nan
    agrees(network, x)
    with torch.no_grad():
        y = network(x)
    assert torch.isfinite(y[[0, 2]]).all()
    if recipe == "fuse":
        assert torch.isnan(y[1]).any()


def test_several_threads(network: nn.Module) -> None:
    inputs = [image(2) for _ in range(4)]
    expected = [plainly(network, x) for x in inputs]
    agrees(network, inputs[0])
    wrong: list[Any] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                y = network(inputs[number])
                if not torch.allclose(y, expected[number], rtol=1e-4, atol=1e-5):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_hooks(network: nn.Module) -> None:
    x, seen = image(2), []
    with torch.inference_mode():
        for _ in range(4):
            y = network(x)
    torch.testing.assert_close(y.clone(), plainly(network, x), rtol=1e-4, atol=1e-5)
    agrees(network, x)
    last = list(network.children())[-2 if isinstance(list(network.children())[-1], nn.Dropout) else -1]
    handle = last.register_forward_hook(lambda *_: seen.append(1))
    agrees(network, x, calls=2)
    handle.remove()
    assert len(seen) == 3, "a recording would pass the hook by"
    agrees(network, x)


def test_a_function_is_a_step_by_its_mark_and_not_by_its_name() -> None:
    def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b

    with pytest.raises(ValueError, match="there is no step 'subtract'"):
        recorded("subtract")(add)
    replays = Replays(lambda x: add(torch.relu(x), x))
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
            assert torch.equal(replays(x), torch.relu(x) - x)


def test_calls_give_the_same_bits_from_the_second_on(network: nn.Module) -> None:
    x = image(2)
    with torch.inference_mode():
        network(x)
        second = network(x)
        assert all(torch.equal(network(x), second) for _ in range(3))
    assert replays(network)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x: x[0], ValueError, r"expected 4D input \(got 3D input\)"),
        (lambda x: x.expand(2, 3, 16, 16), ValueError, r"'.+' takes input \[N, C, H, W\] with 1 channels"),
        (lambda x: x.int(), TypeError, r"'.+' takes float input, not torch\.int32"),
        (lambda x: x.to_sparse(), TypeError, r"'.+' takes dense input, not torch\.sparse_coo"),
    ],
)
def test_bad_inputs_are_refused_by_the_layer_that_they_reach(
    network: nn.Module, before: int, change: Any, error: type[Exception], message: str
) -> None:
    x = image(2)
    with torch.inference_mode():
        for _ in range(before):
            network(x)
        with pytest.raises(error, match=message):
            network(change(x))
        network(x)
