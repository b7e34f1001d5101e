"""Timing several pools of threads in one process."""

from __future__ import annotations

import os
import threading
import time

import pytest

from bench.idle import split_registers, until_idle


def test_it_waits_for_a_thread_that_spins():
    end = time.perf_counter() + 0.1

    def spin() -> None:
        while time.perf_counter() < end:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    until_idle()
    assert time.perf_counter() >= end
    thread.join()


def test_it_does_not_wait_for_ever():
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    begin = time.perf_counter()
    until_idle(patience=0.1)
    assert 0.1 <= time.perf_counter() - begin < 1
    stop.set()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no threads to cores")
def test_threads_are_kept_apart_and_let_go():
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with split_registers() as bind:
        bind()
        own, other = os.sched_getaffinity(0), os.sched_getaffinity(thread.native_id)
        assert len(own) == 1 and other == cores - own
    assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == cores
    stop.set()
    thread.join()
