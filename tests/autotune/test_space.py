"""How a configuration is chosen: constraints, tables, tuning, the heuristic; and what is never done."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.autotune.toys import CANDIDATES, DEVICE, Problem, Size, toy
from tilewright import autotune
from tilewright.autotune import modes, shortlist, store, tables
from tilewright.autotune.device import DeviceKind

SMALL = Problem(4)


def test_without_a_table_the_heuristic_decides_and_nothing_is_timed():
    with toy() as (tuned, clock):
        assert tuned.choose(SMALL) == Size(64)
        assert tuned.explain(SMALL).origin == "heuristic"
        assert clock.ran == []


def test_a_tuned_choice_is_remembered_in_this_process_and_the_next():
    with toy() as (tuned, clock):
        outcome = autotune.tune(tuned, SMALL, budget=60)
        assert outcome.config == Size(16) and outcome.speedup == 4.0
        assert tuned.choose(Problem(16)) == Size(16)  # the same bucket
        assert tuned.choose(Problem(17)) == Size(64)
        autotune.forget_tables()
        assert tuned.explain(SMALL) == autotune.Choice(Size(16), "user")
        assert len(clock.ran) > 0


def test_a_choice_that_was_made_is_made_anew_when_a_table_changes():
    with toy() as (tuned, _):
        assert tuned.choose(SMALL) == Size(64)
        autotune.tune(tuned, SMALL, budget=60)
        assert tuned.choose(SMALL) == Size(16)


def test_tuning_on_first_use():
    with toy() as (tuned, clock):
        with autotune.on_first_use():
            assert tuned.choose(SMALL) == Size(16)
            ran = len(clock.ran)
            assert tuned.choose(SMALL) == Size(16) and len(clock.ran) == ran  # once
        assert tuned.choose(SMALL) == Size(16)
        assert tuned.choose(Problem(100)) == Size(64) and len(clock.ran) == ran


def test_the_environment_variable_turns_tuning_on(monkeypatch: pytest.MonkeyPatch):
    with toy() as (tuned, _):
        monkeypatch.setenv("TILEWRIGHT_AUTOTUNE", "0")
        assert tuned.choose(SMALL) == Size(64)
        tuned.invalidate()
        monkeypatch.setenv("TILEWRIGHT_AUTOTUNE", "1")
        assert tuned.choose(SMALL) == Size(16)
        monkeypatch.setenv("TILEWRIGHT_AUTOTUNE", "please")
        with pytest.raises(ValueError, match="TILEWRIGHT_AUTOTUNE=please is neither 0 nor 1"):
            tuned.choose(Problem(100))


def test_an_earlier_untuned_choice_does_not_hide_that_there_is_something_to_tune():
    with toy() as (tuned, _):
        assert tuned.choose(SMALL) == Size(64)
        with autotune.on_first_use():
            assert tuned.choose(SMALL) == Size(16)


def test_nothing_is_run_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch):
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with toy() as (tuned, clock), autotune.on_first_use():
        assert tuned.choose(SMALL) == Size(64) and clock.ran == []
        outcome = autotune.tune(tuned, SMALL, budget=60)
        assert outcome.config is None and outcome.reason == "a CUDA graph is being captured" and clock.ran == []
        capturing = False
        assert tuned.choose(SMALL) == Size(16)  # the choice during capture was not remembered


def test_failures_and_wrong_results_are_recorded_and_never_chosen(caplog: pytest.LogCaptureFixture):
    def result(size: Size) -> int:
        if size.block == 16:
            raise RuntimeError("misaligned address")
        return int(size.block == 32)  # a wrong result

    with toy(result=result) as (tuned, _), caplog.at_level(logging.WARNING, "tilewright"):
        outcome = autotune.tune(tuned, SMALL, budget=60)
        assert outcome.config == Size(64)
        assert outcome.failed == {
            Size(16): "RuntimeError: misaligned address",
            Size(32): "ValueError: wrong result: got 1",
        }
        assert "misaligned address" in caplog.text and "wrong result" in caplog.text
        (entry,) = store.read_table(tables.table_path(DEVICE)).values()
        assert {failure["config"]["block"] for failure in entry["failed"]} == {16, 32}
        assert entry["config"] == {"block": 64, "stages": 2} and entry["microseconds"] == 64e6


def test_where_everything_fails_the_heuristic_stays_and_nothing_is_written():
    with toy(result=lambda size: 1) as (tuned, _):
        with autotune.on_first_use():
            assert tuned.choose(SMALL) == Size(64)
        assert tables.is_empty(DEVICE)


def test_what_cannot_be_set_up_is_no_crash():
    def no_memory(tunable: autotune.Tunable, problem: Problem) -> autotune.Trials:
        raise torch.OutOfMemoryError("8 GiB")

    with toy() as (tuned, _):
        object.__setattr__(tuned, "hooks", autotune.Hooks(**{**vars(tuned.hooks), "trials": no_memory}))
        with autotune.on_first_use():
            assert tuned.choose(SMALL) == Size(64)
            assert "8 GiB" in autotune.tune(tuned, SMALL, budget=1).reason


def refuse_above(most: int):
    return lambda size, problem: f"{size.block} is above {most}" if size.block > most else None


def test_a_constraint_overrides_the_heuristic_and_explains():
    with toy(why_not=refuse_above(32)) as (tuned, clock):
        choice = tuned.explain(SMALL)
        assert choice.config == Size(16) and choice.origin == "heuristic"
        assert choice.reasons == ("the heuristic's {'block': 64, 'stages': 2} is not used: 64 is above 32",)
        outcome = autotune.tune(tuned, SMALL, budget=60)
        assert outcome.refused == {Size(64): "64 is above 32", Size(128): "128 is above 32"}
        assert {size.block for size in clock.ran} == {16, 32}


def test_no_configuration_at_all_raises_with_the_reasons():
    with toy(why_not=refuse_above(8)) as (tuned, _), pytest.raises(ValueError, match="no configuration serves .*64 is"):
        tuned.choose(SMALL)


def test_a_user_fixes_fields():
    with toy() as (tuned, _):
        autotune.tune(tuned, SMALL, budget=60)
        with autotune.constraints(tuned.name, block=128):
            assert tuned.explain(SMALL) == autotune.Choice(Size(128), "constraint")
            with autotune.constraints(tuned.name, stages=5):  # none of the candidates: the others are changed
                assert tuned.choose(SMALL) == Size(128, 5)
            assert tuned.choose(SMALL) == Size(128)
        assert tuned.choose(SMALL) == Size(16)


def test_a_wish_that_cannot_be_met_raises():
    with toy(why_not=refuse_above(64)) as (tuned, _):
        with (
            autotune.constraints(tuned.name, block=128),
            pytest.raises(ValueError, match="no configuration with block=128 serves .*128 is above 64"),
        ):
            tuned.choose(SMALL)
        with (
            autotune.constraints(tuned.name, blok=128),
            pytest.raises(ValueError, match="has no blok, only block, stages"),
        ):
            tuned.choose(SMALL)
    with pytest.raises(ValueError, match="nothing that is tuned is called 'no such kernel'"):
        autotune.constraints("no such kernel", block=1).__enter__()


@pytest.mark.parametrize(
    "config",
    [{"block": 2**40, "stages": 2}, {"block": "16", "stages": 2}, {"block": 16}, {}, {"block": 16.0, "stages": 2}],
)
def test_a_table_cannot_make_a_kernel_use_what_it_does_not_list(config: dict):
    with toy() as (tuned, _):
        key = tables.key_of(tuned.name, tuned.hooks.facts(SMALL), DEVICE.driver, tuned.source())
        tables.remember(DEVICE, {key: {"config": config}})
        choice = tuned.explain(SMALL)
        assert choice.config == Size(64) and "it is none of the kernel's" in choice.reasons[0]


def test_a_tabled_choice_that_no_longer_fits_is_passed_over_with_the_reason():
    with toy(why_not=lambda size, problem: "no room" if size.block == 16 else None) as (tuned, _):
        key = tables.key_of(tuned.name, tuned.hooks.facts(SMALL), DEVICE.driver, tuned.source())
        tables.remember(DEVICE, {key: {"config": {"block": 16, "stages": 2}}})
        assert tuned.choose(SMALL) == Size(64)
        assert tuned.explain(SMALL).reasons[0].endswith("is not used: no room")


def test_a_short_list_limits_what_is_timed():
    with toy() as (tuned, clock):
        outcome = autotune.tune(tuned, SMALL, budget=60, candidates=[Size(32)])
        assert outcome.config == Size(32) and {size.block for size in clock.ran} == {32, 64}


def test_the_list_of_the_package_is_found_by_the_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shortlist, "SHIPPED", tmp_path)
    figures = autotune.offline.CompiledCandidate(64, 0, 1024, "wgmma")
    for arch, expected in (("sm_90", {16, 64}), ("sm_100", {16, 32, 64, 128})):
        with toy(device=DeviceKind("Toy 9000", arch, 132, "1.2.3")) as (tuned, clock):
            made = autotune.ShortList("sm_90")
            made.add(autotune.ShortListed(tuned, SMALL, {Size(16): figures}, {Size(32): "8 bytes of registers spill"}))
            made.write(tmp_path / "sm_90.json")
            shortlist.shipped.cache_clear()
            assert autotune.tune(tuned, SMALL, budget=60).config == Size(16)
            assert {size.block for size in clock.ran} == expected  # with the heuristic's
            assert autotune.tune(tuned, Problem(4096), budget=60).config == Size(16)
            assert {size.block for size in clock.ran} == {16, 32, 64, 128}  # of which the list does not speak
    shortlist.shipped.cache_clear()


def test_many_threads_tune_once_and_agree():
    with toy(lambda size: time.sleep(0.002) or float(size.block)) as (tuned, clock):
        found, start = [], threading.Barrier(8)

        def ask() -> None:
            start.wait()
            found.append(tuned.choose(SMALL))

        with autotune.on_first_use():
            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert found == [Size(16)] * 8
        assert sum(size == Size(128) for size in clock.ran) == 1 + 3  # checked and timed by one thread alone


def test_a_forced_configuration_is_that_thread_s_alone():
    with toy() as (tuned, _):
        seen = []
        with tuned.forced(Size(8)):
            other = threading.Thread(target=lambda: seen.append(tuned.choose(SMALL)))
            other.start()
            other.join()
            assert tuned.choose(SMALL) == Size(8)
        assert seen == [Size(64)] and tuned.choose(SMALL) == Size(64)


def test_the_memory_of_choices_is_bounded(monkeypatch: pytest.MonkeyPatch):
    with toy() as (tuned, _):
        for m in range(5000):
            tuned.choose(Problem(m))
        assert len(tuned._memo) <= 4096


def test_names_are_unique():
    with toy(name="twice"), pytest.raises(ValueError, match="'twice' is registered already"), toy(name="twice"):
        pass


def test_modes_count_up_and_down():
    assert not autotune.tuning_wanted()
    with autotune.on_first_use():
        with autotune.on_first_use():
            pass
        assert autotune.tuning_wanted()
    assert not autotune.tuning_wanted() and modes.why_not_now() is None
    assert len(CANDIDATES) == 4
