"""Programs whose threads take a batch image by image through several steps answer as without."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tilewright as tw
from tests.convert.networks import Inception, SmallMobileNet, SmallResNet, SqueezeExcite, programs_of, settled
from tilewright.kernels.cpu import replay, replay_chains, steps
from tilewright.kernels.cpu.replay import Replay
from tilewright.kernels.cpu.replay_chains import Chain, chains_of

reason = steps.why_no_kernels()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

#: Networks, and the channels of their images.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (SmallResNet, 1),
    "mobilenet": (SmallMobileNet, 1),
    "hardswish": (lambda: SmallMobileNet(activation=nn.Hardswish), 1),
    "efficientnet": (lambda: nn.Sequential(SqueezeExcite(), SqueezeExcite()), 12),
    "inception": (Inception, 12),
}
SIZE = 20
#: Small enough for images of that size to overflow it, and large enough for the weights of some steps.
CACHE = 5 << 10


@pytest.fixture(params=NETWORKS)
def converted(request: pytest.FixtureRequest) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    make, channels = NETWORKS[request.param]
    data = [torch.randn(4, channels, SIZE, SIZE)]
    return tw.convert_model(settled(make()), "int8", calibration_data=data, progress=False), channels


def replays_of(model: nn.Module, x: torch.Tensor) -> list[Replay]:
    """What replays calls with images of that shape, recorded anew."""
    programs = [each for each in programs_of(model).values() if each._replays is not None]
    for program in programs:
        program._replays._known[1].clear()
    with torch.inference_mode():
        for _ in range(3):
            model(x)
    return [each for program in programs for each in program._replays.replays]


def chain_lengths(replays: list[Replay]) -> list[int]:
    return [step.chain for each in replays for part in each.parts for step in part.steps if step.chain]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [2, 5, 8])
def test_the_bits_are_the_same(
    converted: tuple[nn.Module, int], batch: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, channels = converted
    x = torch.randn(batch, channels, SIZE, SIZE)
    given = [x, torch.randn_like(x), x.clone()]
    given[2][batch - 1, :, 3, 3] = torch.nan
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(replay, "chains_of", lambda *_: [])
        assert not chain_lengths(replays_of(model, x))
        with torch.inference_mode():
            expected = [model(each) for each in given]
        monkeypatch.setattr(replay, "chains_of", lambda parts, count: chains_of(parts, count, CACHE))
        lengths = chain_lengths(replays_of(model, x))
        assert (max(lengths, default=0) >= 2) == (batch >= threads)
        with torch.inference_mode():
            found = [model(each) for each in given]
    finally:
        torch.set_num_threads(before)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert found[2][batch - 1].isnan().all() and found[2][: batch - 1].isfinite().all()


def test_what_fits_the_cache_is_no_chain(converted: tuple[nn.Module, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, channels = converted
    monkeypatch.setattr(replay_chains, "cache_bytes", lambda level: 64 << 20)
    assert not chain_lengths(replays_of(model, torch.randn(4, channels, SIZE, SIZE)))


def test_a_replay_that_would_answer_otherwise_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tw.convert_model(settled(SmallResNet()), "int8", calibration_data=[torch.randn(4, 1, SIZE, SIZE)])
    x = torch.randn(4, 1, SIZE, SIZE)
    monkeypatch.setattr(replay, "chains_of", lambda parts, count: chains_of(parts, count, CACHE))
    monkeypatch.setattr(replay, "is_same", lambda *_: False)
    assert not chain_lengths(replays_of(model, x))


def part_of(*made: tuple[int, int, int]) -> SimpleNamespace:
    """Steps by bytes of an image that each reads and writes, its weights, and images."""

    def step(size: int, weights: int, images: int) -> steps.Description:
        channels, out_channels = size // 2, weights // (size // 2)
        d = steps.Description(kind=steps.CONV, x_type=steps.INT8, y_type=steps.INT8, batch=images, channels=channels)
        d.height = d.width = d.out_height = d.groups = d.kernel_height = d.kernel_width = 1
        d.out_channels, d.out_width = out_channels, channels // out_channels
        return d

    return SimpleNamespace(steps=[step(*each) for each in made], groups=list(range(len(made))))


@pytest.mark.parametrize(
    "made, threads, expected",
    [
        ([(4096, 2048, 8)] * 3, 1, [Chain(0, 2, 8)]),
        ([(4096, 2048, 8)] * 3, 8, []),  # each thread's image fits its cache
        ([(4096, 2048, 1)] * 3, 1, []),
        ([(4096, 2048, 8)] * 5, 1, [Chain(0, 3, 8)]),  # four weights fill half of the cache
        ([(4096, 2048, 8), (4096, 32768, 8), (4096, 2048, 8)], 1, []),  # a large weight stands between
        ([(512, 2048, 8), (4096, 2048, 8), (512, 2048, 8), (4096, 2048, 8), (512, 2048, 8)], 1, [Chain(1, 3, 8)]),
        ([(4096, 2048, 8), (4096, 2048, 8), (4096, 2048, 4), (8192, 4096, 4)], 1, [Chain(0, 1, 8)]),
    ],
    ids=str,
)
def test_which_steps_become_a_chain(made: list[tuple[int, int, int]], threads: int, expected: list[Chain]) -> None:
    assert chains_of([part_of(*made)], threads, 16384) == expected  # type: ignore[list-item]
