"""The commands ``tilewright tune`` and ``tilewright cache``, and ``commands.doctor`` for a model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewright as tw
from tilewright import autotune, commands
from tilewright.__main__ import main
from tilewright.autotune import tables
from tilewright.commands import doctor, tune
from tilewright.convert.schemes import base
from tilewright.kernels import tuning
from tilewright.kernels.cpu import peaks
from tilewright.kernels.dispatch.problem import Problem
from tilewright.kernels.dispatch.router import record_problems
from tilewright.kernels.roofline import CEILINGS, ceilings_for, floor, measure_cpu
from tilewright.nn import Int8ActInt4WeightLinear


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle_machine: None):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "tables"))
    monkeypatch.setenv("COLUMNS", "400")
    autotune.forget_tables()
    yield tmp_path / "tables"
    autotune.forget_tables()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    found = capsys.readouterr()
    return status, found.out, found.err


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    tw.save_model(tw.convert_model(model, {"2": "int4-g32", "*": "int8"}), tmp_path / "model")
    return tmp_path / "model"


def test_tune_a_model_then_show_export_clear_import(saved: Path, folder: Path, tmp_path: Path, capsys):
    status, out, _ = run(capsys, "tune", saved, "--m", "1,3,4", "--device", "cpu", "--seconds", 60)
    assert status == 0 and "int8_linear.implementation M=1 N=128 K=64" in out and "timed" in out
    # Two layers of one shape, and two batches of one bucket, are tuned once.
    assert out.count("int8_linear.implementation") == 2 and out.count("int4_linear.implementation") == 2
    (path,) = tables.user_tables()
    assert path.parent == folder
    status, out, _ = run(capsys, "cache", "show")
    assert status == 0 and "4 entries" in out and "implementation=" in out and "m=<=4 n=128 k=64" in out
    copy = tmp_path / "copy.json"
    assert run(capsys, "cache", "export", copy)[0] == 0
    assert run(capsys, "cache", "export", copy)[0] == 2
    assert "deleted 1 tables with 4 entries" in run(capsys, "cache", "clear")[1]
    assert run(capsys, "cache", "export", tmp_path / "other.json")[2].startswith("tilewright cache: there is no table")
    assert "added 4 entries" in run(capsys, "cache", "import", copy)[1]
    asked = Problem("int8_linear", 2, 128, 64, torch.float32)
    assert tuning.preferred(asked.with_rows(4)) is not None and tuning.preferred(asked.with_rows(64)) is None


def test_clearing_takes_what_was_measured_along(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    found = peaks.Peaks(2, {"avx2 float32": 1e9}, 1e-6, 0.0, None, "2026-12-01")
    for variable in ("", str(tmp_path / "named.json")):
        monkeypatch.setenv("TILEWRIGHT_CPU_TABLE", variable)
        assert peaks.store(found) and peaks.path().is_file()
        beside = peaks.path().with_name("somebody.json")
        beside.write_text("{}")
        assert "and 1 files of what this CPU does at most" in run(capsys, "cache", "clear")[1]
        assert not peaks.path().exists() and beside.exists()


def test_a_busy_machine_is_said_to_be_busy(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("tilewright.autotune.clock.CpuClock.watch", lambda self: lambda: "others used 80% of the cores")
    status, out, _ = run(capsys, "tune", saved, "--m", "1", "--device", "cpu", "--seconds", 60)
    assert status == 1 and "the machine is busy (others used 80% of the cores): nothing was written" in out
    assert not tables.user_tables()


def test_tables_of_cpus_can_be_turned_off(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("TILEWRIGHT_CPU_TABLE", "off")
    status, _, error = run(capsys, "tune", saved, "--m", "1", "--device", "cpu")
    assert status == 2 and "TILEWRIGHT_CPU_TABLE=off turns off what is found on a CPU" in error
    assert [f.found for f in doctor.examine() if f.subject == "timed on this CPU"]


def test_doctor_shows_what_was_timed(saved: Path, capsys):
    run(capsys, "tune", saved, "--m", "3", "--device", "cpu", "--seconds", 60)
    shown = {finding.subject.strip(): finding.found for finding in doctor.examine()}
    assert re.search(r"^\w.*, [\d.]+ us( \(\w.* [\d.]+ us\))?$", shown["int8_linear <=4 x 128 x 64 float32"])


def test_a_bad_table_is_shown_as_such(folder: Path, capsys):
    folder.mkdir()
    (folder / "x.v1.json").write_text("torn")
    status, out, _ = run(capsys, "cache", "show")
    assert status == 1 and "no JSON" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["tune"], "name a folder that save_model wrote, or operators"),
        (["tune", "nowhere"], "tilewright.json"),
        (["tune", "--op", "int8_linear", "--device", "cuda"], "no GPU can be used here"),
        (["tune", "--op", "int8_linear", "--device", "cpu", "--shortlist", "nowhere.json"], "nowhere.json"),
        (["cache", "import", "nowhere.json"], "does not exist"),
        (["doctor", "nowhere"], "is no folder"),
        (["doctor", "no_such_module:x"], "cannot be imported"),
        (["doctor", "torch.nn:Linear"], "without arguments"),
        (["doctor", "builtins:dict"], "returned dict, not an nn.Module"),
        (["doctor", "torch.nn:Identity"], "no linear or convolution layer"),
        (["doctor", f"{__name__}:perceptron", "--chip", "Abacus"], "no ceilings are known for 'Abacus'"),
        (["doctor", f"{__name__}:perceptron", "--batch", "0"], "batch must be at least 1"),
        (["doctor", f"{__name__}:perceptron", "--image", "3,2"], "is not like 3,224,224"),
        (["doctor", f"{__name__}:perceptron", "--image", "3,2,2", "--tokens", "4"], "either tokens or an image"),
    ],
)
def test_what_the_user_got_wrong_is_said_in_words(arguments: list[str], words: str, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    status, _, err = run(capsys, *arguments)
    assert status == 2 and words in err


@pytest.mark.parametrize("batches", ["0", "1,x", ""])
def test_bad_batches(batches: str):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--op", "int8_linear", "--m", batches])
    assert stopped.value.code == 2


def test_time_that_is_over_is_said_and_is_no_success(saved: Path, capsys):
    status, out, _ = run(capsys, "tune", saved, "--m", "1,16", "--device", "cpu", "--seconds", 0)
    assert status == 1 and "the time is over: 4 of 4 were not tuned" in out


@pytest.mark.aot
def test_offline_then_from_the_short_list(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
    short = tmp_path / "short.json"
    arguments = ["tune", "--op", "int4_int8_linear", "--shape", "256x512", "--m", "1", "--offline"]
    few = autotune.Tunable.split_candidates
    monkeypatch.setattr(autotune.Tunable, "split_candidates", lambda self, problem: (few(self, problem)[0][:2], {}))
    status, out, _ = run(capsys, *arguments, "--target", "sm_90", "-o", short)
    assert status == 0 and out.count("2 kept, 0 dropped") == 2
    found = autotune.ShortList.read(short)
    assert found.target == "sm_90" and len(found.lists) == 2
    # Called again it goes on: with what is there already it compiles nothing.
    monkeypatch.setattr(autotune, "prune", None)
    status, out, _ = run(capsys, *arguments, "--target", "sm_90", "-o", short)
    assert status == 0 and out.count("2 kept, 0 dropped before") == 2
    status, out, _ = run(capsys, *arguments, "--seconds", -1, "--m", 64, "--target", "sm_90", "-o", short)
    assert status == 1 and "not looked at; the same command goes on from here" in out
    assert autotune.ShortList.read(short).lists == found.lists
    status, _, err = run(capsys, *arguments, "--target", "sm_80", "-o", short)
    assert status == 2 and "is a short list for sm_90, not for sm_80" in err
    monkeypatch.setattr(tune, "triton_version", lambda: "99.0")
    status, out, _ = run(capsys, *arguments, "--seconds", -1, "--target", "sm_90", "-o", short)
    assert status == 1 and "everything is compiled anew" in out


# ---- tune, with convolutions
def small_network() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 128))


@pytest.fixture
def saved_network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    images = [torch.randn(2, 3, 32, 32)]
    tw.save_model(tw.convert_model(small_network().eval(), "int8", calibration_data=images), tmp_path / "network")
    return tmp_path / "network"


def test_convolutions_are_tuned_for_the_images_of_a_run(saved_network: Path, capsys):
    model = ["--model", f"{__name__}:small_network", "--image", "3,32,32"]
    status, out, _ = run(capsys, "tune", saved_network, *model, "--m", "1,2", "--device", "cpu", "--seconds", 60)
    assert status == 0, out
    # What was tuned is what the model asks for when it runs.
    loaded = tw.load_model(saved_network, small_network).eval()
    with record_problems() as posed, torch.inference_mode():
        loaded(torch.randn(2, 3, 32, 32))
    convolutions = [problem for problem in posed if problem.conv is not None]
    assert len(convolutions) == 3
    # There is nothing to choose where PyTorch's int8 products are wrong, which without VNNI they are.
    tuned = tuning.implementation_of("int8_conv2d_fused")
    open_ones = [problem for problem in convolutions if len(tuned.split_candidates(problem)[0]) > 1]
    assert len(open_ones) in (0, 3)
    for problem in open_ones:
        assert tuned.tuned(problem)[0].origin == "user"
    # The convolutions and a linear layer, for each of two batches.
    assert out.count("int8_conv2d_fused.implementation") == 2 * len(open_ones)
    assert out.count("int8_linear.implementation") == 2
    assert ("M=512 N=32 K=9 (3x3 / 1 on 2 x 16x16, 32 groups)" in out) == bool(open_ones)


def test_without_a_run_convolutions_are_left_out_in_words(saved_network: Path, capsys):
    status, out, _ = run(capsys, "tune", saved_network, "--m", "1", "--device", "cpu", "--seconds", 60)
    assert status == 0 and "3 layers are left out" in out and "--image 3,224,224" in out
    assert out.count("implementation=") == 1
    status, _, err = run(capsys, "tune", saved_network, "--model", f"{__name__}:small_network", "--m", "1")
    assert status == 2 and "--model needs --image C,H,W or --tokens COUNT" in err
    other = ["--model", f"{__name__}:perceptron", "--image", "3,32,32"]
    assert run(capsys, "tune", saved_network, *other, "--m", "1")[0] == 2


@pytest.mark.aot
def test_convolutions_offline(saved_network: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="Triton is not installed: it publishes wheels for Linux alone")
    few = autotune.Tunable.split_candidates
    monkeypatch.setattr(autotune.Tunable, "split_candidates", lambda self, problem: (few(self, problem)[0][:1], {}))
    model = ["--model", f"{__name__}:small_network", "--image", "3,32,32", "--dtype", "bf16", "--m", "4"]
    status, out, _ = run(capsys, "tune", saved_network, *model, "--offline", "-o", tmp_path / "short.json")
    assert status == 0, out
    for kernel in ("conv2d.triton_stem", "conv2d.triton_depthwise", "conv2d.triton_pointwise", "int8_linear.triton"):
        assert kernel in out
    assert out.count("1 kept, 0 dropped") == len(autotune.ShortList.read(tmp_path / "short.json").lists) >= 6


# ---- doctor
def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4096, 11008), nn.ReLU(), nn.Linear(11008, 4096), nn.ReLU(), nn.Linear(4096, 8))


def diagnose(batch: int, **options: Any) -> list[doctor.diagnose.__class__]:
    found = doctor.diagnose(perceptron().to("meta"), batch=batch, chip="NVIDIA H200", dtype=torch.bfloat16, **options)
    return list(found.layers)


def test_small_batches_are_bound_by_memory_and_gain_most_from_int4():
    first, _, small = diagnose(16)
    assert first.bound == "memory" and first.best[0] == "w4a16" and 3.6 < first.best[1] < 3.9
    assert first.verdict.startswith("w4a16 up to 3.") and first.helps
    assert not small.helps and "could be saved, and a call alone costs about 4 us" in small.verdict


def test_large_batches_are_bound_by_arithmetic_and_weights_alone_do_not_help():
    first = diagnose(8192)[0]
    assert first.bound == "compute" and first.best[0] == "w8a8" and abs(first.best[1] - 2.0) < 0.01
    assert abs(first.formats["w4a16"] - 1.0) < 0.01 and "weight-only formats will not help" in first.verdict


def test_floors_against_arithmetic_by_hand():
    h200 = CEILINGS["H200"]
    plain = floor(Problem("linear", 16, 28672, 4096, torch.bfloat16), h200)
    moved = 2 * (28672 * 4096 + 16 * 4096 + 16 * 28672)
    assert plain.bound == "memory" and abs(plain.microseconds - 1e6 * moved / 4.8e12) < 1e-6
    int4 = Problem("int4_linear", 1, 4096, 4096, torch.bfloat16, group_size=128, scale_dtype=torch.bfloat16)
    moved = 4096 * 4096 / 2 + 4096 * 32 * 2 + 2 * 4096 * 2
    assert abs(floor(int4, h200).memory - moved / 4.8e12) < 1e-12
    big = floor(Problem("int8_linear", 8192, 8192, 8192, torch.bfloat16), h200)
    assert big.bound == "compute" and abs(big.seconds - 2 * 8192**3 / 1979e12) < 1e-9
    assert floor(Problem("quantize_per_row", 10, 10, 100, torch.float16), h200).memory == (10 * 100 * 3 + 40) / 4.8e12
    assert ceilings_for("NVIDIA H100 80GB HBM3").name == "H100"


def test_rows_are_counted_on_the_meta_device_and_convolutions_too():
    model = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, padding="same"), nn.Flatten(2)).to(
        "meta"
    )
    found = doctor.diagnose(model, torch.empty(8, 3, 32, 32, device="meta"), chip="H200", dtype=torch.float16)
    assert [(one.problem.m, one.problem.n, one.problem.k) for one in found.layers] == [
        (8 * 16 * 16, 64, 147),
        (8 * 16 * 16, 64, 576),
    ]
    assert found.unseen == () and "H200" in str(found)
    unseen = doctor.diagnose(nn.Sequential(*perceptron(), nn.Conv2d(8, 8, 3)).to("meta"), batch=4, chip="H200")
    assert unseen.unseen == ("5",) and "did not reach 1 layers" in str(unseen)


def test_doctor_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    doctor.diagnose(model, torch.randn(2, 3, 8), chip="H200")
    assert model.training and not model[0]._forward_pre_hooks
    assert [one.problem.m for one in doctor.diagnose(model, torch.randn(2, 3, 8), chip="H200").layers] == [6, 6]


def test_doctor_of_files(tmp_path: Path, capsys):
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.zeros(4096, 512), "embed_tokens.weight": torch.zeros(9, 512), "a.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name in (tmp_path, tmp_path / "model.safetensors"):
        status, out, _ = run(capsys, "doctor", name, "--batch", 2, "--chip", "A100", "--dtype", "fp16")
        assert status == 0 and "2 x 4096 x 512" in out and "1 layers" in out
    assert run(capsys, "doctor", f"{__name__}:perceptron", "--chip", "H200", "--batch", 16, "--dtype", "bf16")[0] == 0


def test_this_cpu_is_measured():
    found = measure_cpu(256)
    assert found.name == "this CPU" and min(found.bytes, found.float32, found.int8, found.overhead) > 0


# ---- report
def test_the_report_of_a_folder_is_that_of_the_model(tmp_path: Path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    converted = tw.convert_model(model, {"2": "int4-g32", "4": None, "*": "int8"})
    tw.save_model(converted, tmp_path / "model")
    status, out, _ = run(capsys, "report", tmp_path / "model", "--json")
    found, expected = json.loads(out), tw.report(converted).to_json()
    assert status == 0 and found["totals"] == expected["totals"]
    same = ("name", "scheme", "bytes_before", "bytes_after", "weight_error", "output_error", "smoothing", "reason")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert all(layers[layer["name"]][field] == layer[field] for layer in expected["layers"] for field in same)
    out = run(capsys, "report", tmp_path / "model")[1]
    assert out.startswith("model: 5 layers converted, 1 left alone\n") and "{0-1,3,5}  x4" in out
    out = run(capsys, "report", tmp_path / "model", "--all")[1]
    assert all(any(line.startswith(f"{name}  ") for line in out.splitlines()) for name in "01235")
    assert run(capsys, "report", tmp_path)[0] == 2


# ---- what appears by itself
def test_a_command_is_a_module_of_its_room(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "greet.py").write_text(
        '"""``tilewright greet``: say hello to someone."""\n'
        "def add_arguments(parser):\n    parser.add_argument('name')\n"
        "def run(options):\n    print('hello', options.name)\n    return 3\n"
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tilewright.commands.greet", raising=False)
    assert run(capsys, "greet", "you")[:2] == (3, "hello you\n")
    with pytest.raises(SystemExit):
        main(["--help"])
    helped = capsys.readouterr().out
    assert "say hello to someone" in helped and "what has been tuned on this machine" in helped
    for name in ("problems", "diagnosis", "model_files"):
        with pytest.raises(SystemExit):
            main([name])


def test_a_new_scheme_is_examined_and_diagnosed_too(monkeypatch: pytest.MonkeyPatch):
    class Coarse(tw.Int8ActInt4Weight):
        """A format of its own."""

        module = type("CoarseLinear", (Int8ActInt4WeightLinear,), {"scheme_name": "w4a8-coarse"})

    monkeypatch.setattr(base, "_registered", {**base.registered_schemes(), "Coarse": Coarse})
    assert "w4a8-coarse on this CPU" in {finding.subject for finding in doctor.examine()}
    diagnosis = tw.diagnose(nn.Linear(4096, 4096), chip="H200")
    assert diagnosis.layers[0].formats["w4a8-coarse"] == diagnosis.layers[0].formats["w4a8"]
