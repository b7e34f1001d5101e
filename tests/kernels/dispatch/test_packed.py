"""The cache of repacked weights: made once, renewed when the weight changes, gone with it."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from tilewright.kernels.dispatch import packed as cache
from tilewright.kernels.dispatch.packed import invalidate, packed, packed_bytes


class Counter:
    """A ``make`` that counts its calls and returns a new tensor each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.full((10,), float(self.calls))


def test_made_once_for_each_layout() -> None:
    weight, make = torch.zeros(4, 4), Counter()
    first = packed(weight, "a", make)
    assert packed(weight, "a", make) is first
    assert packed(weight.detach(), "a", make) is first
    assert make.calls == 1
    assert packed(weight, "b", make) is not first
    assert make.calls == 2


def test_a_write_into_the_weight_or_its_companions_makes_it_anew() -> None:
    weight, scale, make = torch.zeros(4, 4), torch.ones(4), Counter()
    packed(weight, "a", make, scale, None)
    packed(weight, "a", make, scale, None)
    assert make.calls == 1
    weight.add_(1)
    packed(weight, "a", make, scale, None)
    assert make.calls == 2
    scale.mul_(2)
    packed(weight, "a", make, scale, None)
    assert make.calls == 3
    packed(weight, "a", make, scale.clone(), None)
    assert make.calls == 4


def test_a_write_in_inference_mode_counts() -> None:
    weight, make = torch.zeros(4, 4), Counter()
    packed(weight, "a", make)
    with torch.inference_mode():
        weight.add_(1)
        packed(weight, "a", make)
    assert make.calls == 2


def test_what_was_made_from_an_inference_tensor_can_be_forgotten() -> None:
    """Such tensors have no version counter, so a write goes unseen until it is said."""
    with torch.inference_mode():
        weight = torch.zeros(4, 4)
    make = Counter()
    packed(weight, "a", make)
    packed(weight, "b", make)
    invalidate(weight)
    packed(weight, "a", make)
    assert make.calls == 3


def test_views_of_one_memory_are_told_apart() -> None:
    weight, make = torch.zeros(4, 4), Counter()
    for view in (weight, weight.t(), weight[:2], weight[:, :2], weight[2:], weight.view(2, 8)):
        packed(view, "a", make)
    assert make.calls == 6


def test_a_copy_has_its_own_entry() -> None:
    weight, make = torch.zeros(4, 4), Counter()
    packed(weight, "a", make)
    packed(copy.deepcopy(weight), "a", make)
    assert make.calls == 2


def test_the_entry_goes_with_the_weight() -> None:
    gc.collect()
    entries, size = len(cache._entries.items()), packed_bytes()
    weight, scale = torch.zeros(4, 4), torch.ones(4)
    packed(weight, "a", Counter(), scale)
    weight.add_(1)
    packed(weight, "a", Counter(), scale)
    assert (len(cache._entries.items()), packed_bytes()) == (entries + 1, size + 40)
    view = weight[0]
    del weight
    gc.collect()
    assert len(cache._entries.items()) == entries + 1, "the memory lives on in a view"
    del view, scale
    gc.collect()
    assert (len(cache._entries.items()), packed_bytes()) == (entries, size)


def test_memory_that_is_handed_out_again_is_not_taken_for_the_old_weight() -> None:
    make = Counter()
    for _ in range(50):
        weight = torch.zeros(64, 64)
        packed(weight, "a", make)
        del weight
    assert make.calls == 50


def test_threads_make_it_once() -> None:
    weight, make, start = torch.zeros(4, 4), Counter(), threading.Barrier(4)

    def ask() -> torch.Tensor:
        start.wait()
        return packed(weight, "a", make)

    with ThreadPoolExecutor(4) as pool:
        results = [future.result() for future in [pool.submit(ask) for _ in range(4)]]
    assert make.calls == 1
    assert all(result is results[0] for result in results)


def test_a_write_while_it_is_made_makes_it_anew() -> None:
    weight, calls = torch.zeros(4), []

    def make() -> torch.Tensor:
        made = weight.clone()
        if not calls:
            weight.add_(1)  # as another thread may, once it was read
        calls.append(made)
        return made

    assert torch.equal(packed(weight, "a", make), torch.zeros(4))
    assert torch.equal(packed(weight, "a", make), torch.ones(4))
    assert packed(weight, "a", make) is calls[1]


def test_what_is_made_of_memory_that_goes_meanwhile_is_not_kept() -> None:
    gc.collect()
    entries, weight = len(cache._entries.items()), torch.zeros(4)

    def make() -> torch.Tensor:
        weight.data = torch.ones(4)
        return torch.zeros(4)

    packed(weight, "a", make)
    assert len(cache._entries.items()) == entries
