"""Room behind the keys and values of a cache: what the cache holds is what its own update would have made of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.convert.graph.cache_room import room_for

transformers = pytest.importorskip("transformers", reason="needs transformers")
cache_utils = pytest.importorskip("transformers.cache_utils", reason="needs caches of layers")
if not hasattr(transformers.DynamicCache, "crop") or not hasattr(cache_utils, "DynamicSlidingWindowLayer"):
    pytest.skip("needs caches of layers", allow_module_level=True)

HEADS, WIDTH = 3, 4


def dynamic() -> Any:
    return transformers.DynamicCache()


def with_layer(layer: Any) -> Any:
    cache = transformers.DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [layer]
    return cache


def sliding() -> Any:
    return with_layer(cache_utils.DynamicSlidingWindowLayer(sliding_window=6))


def static() -> Any:
    cache = transformers.DynamicCache()
    cache.__class__ = transformers.StaticCache
    cache.layer_class_to_replicate = None
    cache.layers = [cache_utils.StaticLayer(max_cache_len=40)]
    return cache


KINDS = [dynamic, sliding, static]


def tokens(count: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, count, WIDTH), torch.randn(batch, HEADS, count, WIDTH)


def appended(cache: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a program does."""
    with torch.no_grad():
        room = room_for(cache, 0, key, value)
        if room is None:
            return tuple(cache.update(key, value, 0))
        keys, values, first = room
        keys[:, :, first : first + key.shape[2]] = key
        values[:, :, first : first + key.shape[2]] = value
        return keys, values


def started(make: Callable[[], Any], length: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Two caches that hold the same."""
    given, caches = [each.to(dtype) for each in tokens(length)], (make(), make())
    for cache in caches:
        cache.update(*given, 0)
    return caches


def hold_the_same(mine: Any, theirs: Any) -> None:
    a, b = (vars(cache.layers[0]) for cache in (mine, theirs))
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", KINDS)
def test_holds_what_its_update_makes(make: Callable[[], Any], dtype: torch.dtype) -> None:
    mine, theirs = started(make, dtype=dtype)
    for count in (1, 1, 2, 1, 4, 1, 1, 3):
        given = [each.to(dtype) for each in tokens(count)]
        expected = theirs.update(*given, 0)
        assert room_for(copy.deepcopy(mine), 0, *given) is not None
        for found, wanted in zip(appended(mine, *given), expected, strict=True):
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype == dtype
        hold_the_same(mine, theirs)


def test_nothing_is_copied_where_there_is_room() -> None:
    mine, _ = started(dynamic)
    appended(mine, *tokens(1))
    places = [mine.layers[0].keys.data_ptr(), mine.layers[0].values.data_ptr()]
    for _ in range(40):
        appended(mine, *tokens(1))
    assert [mine.layers[0].keys.data_ptr(), mine.layers[0].values.data_ptr()] == places
    for _ in range(100):  # beyond the room
        appended(mine, *tokens(1))
    assert mine.get_seq_length() == 146


def snapshot(layer: Any) -> Any:
    return layer.keys


def view(layer: Any) -> Any:
    return layer.keys[:, 1:, :3]


def array(layer: Any) -> Any:
    return layer.keys.numpy()


def detached(layer: Any) -> Any:
    return layer.keys.detach()


def its_storage(layer: Any) -> Any:
    return layer.keys.untyped_storage()


@pytest.mark.parametrize("look", [snapshot, view, array, detached, its_storage], ids=lambda look: look.__name__)
@pytest.mark.parametrize("make", [dynamic, sliding])
def test_whoever_looks_at_the_memory_keeps_it(make: Callable[[], Any], look: Callable[[Any], Any]) -> None:
    mine, _ = started(make)
    appended(mine, *tokens(1))
    seen = look(mine.layers[0])
    before = copy.deepcopy(seen)
    appended(mine, *tokens(1))
    mine.layers[0].keys.zero_()
    if isinstance(before, torch.UntypedStorage):
        assert bytes(seen) == bytes(before)
    else:
        assert (seen == before).all()


def test_cropped_reordered_and_repeated() -> None:
    mine, theirs = started(dynamic)
    changes: list[Callable[[Any], Any]] = [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.crop(-1),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 3])),
    ]
    for change in changes:
        for _ in range(3):
            given = tokens(1, mine.layers[0].keys.shape[0])
            appended(mine, *given), theirs.update(*given, 0)
        change(mine), change(theirs)
        given = tokens(1, mine.layers[0].keys.shape[0])
        appended(mine, *given), theirs.update(*given, 0)
        hold_the_same(mine, theirs)


def test_two_that_share_a_tensor_part_ways() -> None:
    mine, _ = started(dynamic)
    appended(mine, *tokens(1))
    other = dynamic()
    other.layers = [copy.copy(mine.layers[0])]
    key, value = tokens(1)
    first, _ = appended(mine, key, value)
    second, _ = appended(other, -key, value)
    assert torch.equal(first[:, :, -1:], key) and torch.equal(second[:, :, -1:], -key)
    assert torch.equal(first[:, :, :-1], second[:, :, :-1])


def test_copies_and_pickles_go_on_by_themselves() -> None:
    mine, theirs = started(dynamic)
    given = tokens(1)
    appended(mine, *given), theirs.update(*given, 0)
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):  # noqa: S301  (made just now)
        hold_the_same(twin, theirs)
        key, value = tokens(1)
        appended(twin, key, value), appended(mine, -key, value)
        assert torch.equal(twin.layers[0].keys[:, :, -1:], key)
        mine.crop(-1)


def test_modes_in_turns() -> None:
    mine, theirs = started(dynamic)
    for number in range(6):
        with torch.inference_mode(number % 2 == 0):
            given = tokens(1)
            appended(mine, *given), theirs.update(*given, 0)
            assert mine.layers[0].keys.is_inference() == (number % 2 == 0)
    hold_the_same(mine, theirs)


def test_a_full_cache_says_so_itself() -> None:
    mine, _ = started(static, 39)
    assert room_for(mine, 0, *tokens(2)) is None
    assert int(mine.layers[0].cumulative_length) == 39
    assert room_for(mine, 0, *tokens(1)) is not None


def test_what_inference_mode_made_is_not_written_to_outside() -> None:
    with torch.inference_mode():
        mine, _ = started(static)
        assert room_for(mine, 0, *tokens(1)) is not None
    assert room_for(mine, 0, *tokens(1)) is None
    assert int(mine.layers[0].cumulative_length) == 6


def test_writing_is_seen_by_autograd() -> None:
    mine, _ = started(static)
    x = torch.ones((), requires_grad=True)
    y = x * mine.layers[0].keys
    appended(mine, *tokens(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Subclass(transformers.DynamicCache):
    pass


def other_update(cache: Any) -> None:
    cache.update = type(cache).update.__get__(cache)


def other_update_of_the_layer(cache: Any) -> None:
    cache.layers[0].update = type(cache.layers[0]).update.__get__(cache.layers[0])


def more_in_the_layer(cache: Any) -> None:
    cache.layers[0].kept = []


def offloading(cache: Any) -> None:
    cache.offloading = True


def of_another_class(cache: Any) -> None:
    cache.__class__ = Subclass


def of_another_type(cache: Any) -> None:
    cache.layers[0].keys = cache.layers[0].keys.double()


def of_bfloat16(cache: Any) -> None:
    cache.layers[0].keys, cache.layers[0].values = (
        x.bfloat16() for x in (cache.layers[0].keys, cache.layers[0].values)
    )


def as_a_parameter(cache: Any) -> None:
    cache.layers[0].keys = torch.nn.Parameter(cache.layers[0].keys)


def with_a_sign_to_change(cache: Any) -> None:
    cache.layers[0].keys = torch._neg_view(cache.layers[0].keys)


def of_other_lengths(cache: Any) -> None:
    cache.layers[0].keys = cache.layers[0].keys[:, :, 1:]


@pytest.mark.parametrize(
    "change",
    [
        *(other_update, other_update_of_the_layer, more_in_the_layer, offloading, of_another_class),
        *(of_another_type, of_bfloat16, as_a_parameter, with_a_sign_to_change, of_other_lengths),
    ],
    ids=lambda change: change.__name__,
)
def test_every_other_cache_updates_itself(change: Callable[[Any], None]) -> None:
    mine, _ = started(dynamic)
    change(mine)
    before = mine.layers[0].keys
    assert room_for(mine, 0, *tokens(1)) is None
    assert mine.layers[0].keys is before


def test_an_update_that_does_something_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, _ = started(dynamic)
    theirs = cache_utils.DynamicLayer.update

    def twice(self: Any, key: torch.Tensor, value: torch.Tensor, *args: Any) -> Any:
        return theirs(self, 2 * key, value, *args)

    assert room_for(mine, 0, *tokens(1)) is not None
    monkeypatch.setattr(cache_utils.DynamicLayer, "update", twice)
    assert room_for(mine, 0, *tokens(1)) is None


def test_a_layer_that_is_not_there_yet() -> None:
    mine, _ = started(dynamic)
    assert room_for(mine, 1, *tokens(1)) is None
    assert room_for(dynamic(), 0, *tokens(1)) is None
    assert room_for(object(), 0, *tokens(1)) is None
