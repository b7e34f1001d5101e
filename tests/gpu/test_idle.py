"""Timing several pools of threads in one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from bench import idle
from bench.idle import separate_cores, until_idle


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[float]]:
    """Gives, for a pool that spins during so many looks, the seconds of each look that ``until_idle`` then takes."""

    def spin_during(count: int) -> list[float]:
        slept: list[float] = []
        monkeypatch.setattr(idle, "time", SimpleNamespace(process_time=lambda: sum(slept[:count]), sleep=slept.append))
        return slept

    return spin_during


@pytest.mark.parametrize("spinning", [0, 1, 12])
def test_it_waits_for_a_thread_that_spins(looks: Callable[[int], list[float]], spinning: int):
    slept = looks(spinning)
    until_idle()
    assert len(slept) == spinning + 1  # the last look saw nothing


def test_it_does_not_wait_for_ever(looks: Callable[[int], list[float]]):
    slept = looks(1_000_000)
    until_idle(patience=0.1)
    assert 0.1 <= sum(slept) < 0.11


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no threads to cores")
def test_threads_are_kept_apart_and_let_go():
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("needs two cores")
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with separate_cores() as bind:
        bind()
        own, other = os.sched_getaffinity(0), os.sched_getaffinity(thread.native_id)
        assert len(own) == 1 and other == cores - own
    assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == cores
    stop.set()
    thread.join()
