"""Several processes and one folder: readers see the older or the newer checkpoint, and killed saves leave nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tilewright.convert import CheckpointError, load_model, save_model
from tilewright.convert.checkpoint import folder as checkpoint_folder
from tilewright.convert.checkpoint import safetensors_file
from tilewright.convert.checkpoint.manifest import read_manifest

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a system with locks on folders")


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def filled(value: float) -> nn.Module:
    model = factory()
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def value_of(model: nn.Module) -> float:
    (value,) = {float(each) for parameter in model.parameters() for each in parameter.detach().unique()}
    return value


def process(code: str, *args: object) -> subprocess.Popen[str]:
    """Python that runs ``code``, which finds what is above and ``folder``."""
    header = f"""
        import os, signal, sys
        from pathlib import Path
        from {__name__} import *
        folder = Path(sys.argv[1])
    """
    text = textwrap.dedent(header) + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, args)], env=environment, stderr=subprocess.PIPE, text=True
    )


def end(child: subprocess.Popen[str]) -> None:
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_tidy(folder: Path) -> bool:
    return names_in(folder) == {"tilewright.json", *read_manifest(folder).shards()}


# ---- one saves while another loads
def test_every_load_during_saves_gives_one_of_the_saves(tmp_path: Path) -> None:
    folder, stop = tmp_path / "model", tmp_path / "stop"
    save_model(filled(0), folder, max_shard_bytes=300)
    child = process(
        """
        models = [filled(value) for value in range(3)]
        turn = 0
        while not Path(sys.argv[2]).exists():
            turn += 1
            save_model(models[turn % 3], folder, max_shard_bytes=(300, 600, 10_000)[turn % 4 % 3])
        """,
        folder,
        stop,
    )
    seen = set()
    try:
        while child.poll() is None and len(seen) < 2:
            seen.add(value_of(load_model(folder, factory)))
        for _ in range(300):
            seen.add(value_of(load_model(folder, factory)))
    finally:
        stop.touch()
        end(child)
    assert seen <= {0.0, 1.0, 2.0} and len(seen) > 1
    assert is_tidy(folder)


def test_a_reader_that_is_overtaken_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(filled(1), tmp_path, max_shard_bytes=300)
    plainly, overtaken = checkpoint_folder._open_shard, []

    def slowly(*args: object) -> object:
        if not overtaken:
            overtaken.append(1)
            save_model(filled(2), tmp_path)
            save_model(filled(1), tmp_path, max_shard_bytes=300)
            save_model(filled(3), tmp_path)
        return plainly(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_folder, "_open_shard", slowly)
    assert value_of(load_model(tmp_path, factory)) == 3


def test_a_reader_that_has_opened_all_files_keeps_them(tmp_path: Path) -> None:
    save_model(filled(1), tmp_path, max_shard_bytes=300)
    newer = filled(2)

    def slow_factory() -> nn.Module:
        save_model(newer, tmp_path)
        return factory()

    assert value_of(load_model(tmp_path, slow_factory)) == 1
    assert value_of(load_model(tmp_path, factory)) == 2


def test_what_is_missing_from_a_folder_at_rest_is_an_error(tmp_path: Path) -> None:
    save_model(filled(1), tmp_path)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_model(tmp_path, factory)


def test_files_of_equal_names_are_equal(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(4)}
    holder = nn.Module()
    for name, tensor in tensors.items():
        holder.register_buffer(name, tensor)
    content: dict[str, bytes] = {}
    for limit in (100, 200, 300, 1000):
        save_model(holder, tmp_path, max_shard_bytes=limit)
        for path in tmp_path.glob("*.safetensors"):
            assert content.setdefault(path.name, path.read_bytes()) == path.read_bytes()
    holder.t0 = holder.t0.view(5, 5)
    save_model(holder, tmp_path)
    assert not content.keys() & names_in(tmp_path)


def test_a_manifest_is_measured_by_what_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(filled(1), tmp_path)
    plainly = checkpoint_folder.open_regular

    def then_replaced(path: Path) -> object:
        file = plainly(path)
        if path.name == "tilewright.json":
            monkeypatch.undo()
            save_model(nn.Sequential(*[nn.Linear(8, 8) for _ in range(9)]), tmp_path / "longer")
            os.replace(tmp_path / "longer" / "tilewright.json", path)
        return file

    monkeypatch.setattr(checkpoint_folder, "open_regular", then_replaced)
    assert value_of(load_model(tmp_path, factory)) == 1


def test_a_checksum_is_of_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(1)

    class Digest:
        def __init__(self) -> None:
            self.plain = hashlib_sha256()

        def update(self, data: bytes) -> None:
            self.plain.update(data)
            with torch.no_grad():
                model[0].weight.fill_(2)  # as another thread may

        def hexdigest(self) -> str:
            return self.plain.hexdigest()

    hashlib_sha256 = safetensors_file.hashlib.sha256
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file.hashlib, "sha256", Digest)
        safetensors_file.write_file(tmp_path / "a", {"w": model[0].weight}, {})
    digest = hashlib_sha256(torch.ones(64).numpy().tobytes()).hexdigest()
    with safetensors_file.open_regular(tmp_path / "a") as file:
        entries, start = safetensors_file.read_header(file, tmp_path / "a")
        tensor = safetensors_file.read_tensor(file, tmp_path / "a", "w", entries["w"], start, digest)
    assert torch.equal(tensor, torch.ones(8, 8))


# ---- two save
@posix
def test_saves_into_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    """The later one neither removes the files that the earlier one is writing, nor those that it has written."""
    save_model(filled(1), tmp_path)
    results: list[float] = []
    with checkpoint_folder.saving(tmp_path) as save:
        unfinished = save.temporary()
        unfinished.write_text("half")
        other = threading.Thread(target=lambda: (save_model(filled(2), tmp_path), results.append(1)))
        other.start()
        other.join(0.2)
        assert not results and unfinished.exists()
        assert value_of(load_model(tmp_path, factory)) == 1
    other.join(60)
    assert results and not unfinished.exists()
    assert value_of(load_model(tmp_path, factory)) == 2 and is_tidy(tmp_path)


@posix
def test_two_processes_save_into_one_folder(tmp_path: Path) -> None:
    code = """
        for turn in range(12):
            save_model(filled(turn % 3), folder, max_shard_bytes=(300, 10_000)[turn % 2])
            assert value_of(load_model(folder, factory)) in (0, 1, 2)
    """
    children = [process(code, tmp_path / "model") for _ in range(2)]
    for child in children:
        end(child)
    assert is_tidy(tmp_path / "model")


def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(filled(1), tmp_path)
    foreign = {".tilewright-0123456789abcdef-0.tmp", "model-0123456789ab-00001-of-00002.safetensors"}
    for name in foreign:
        (tmp_path / name).touch()
    monkeypatch.setattr(checkpoint_folder, "_lock", lambda *args: False)
    save_model(filled(2), tmp_path)
    assert names_in(tmp_path) == foreign | {"tilewright.json", *read_manifest(tmp_path).shards()}
    monkeypatch.undo()
    save_model(filled(3), tmp_path)
    assert is_tidy(tmp_path) == (sys.platform != "win32")


# ---- one is killed
@posix
def test_killed_saves_leave_a_whole_checkpoint_and_the_next_one_sweeps(tmp_path: Path) -> None:
    """Fifteen processes are killed, at each of the things that a save does to files."""
    folder = tmp_path / "model"
    save_model(filled(0), folder, max_shard_bytes=300)
    (folder / "notes.txt").write_text("mine")
    child = process(
        """
        def deadly(function):
            def step(*args, **kwargs):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return step

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        killed = 0
        for turn in range(15):
            left = turn % 13  # a save that finds no litter does so much
            if os.fork() == 0:
                save_model(filled(turn + 1), folder, max_shard_bytes=300)
                os._exit(0)
            killed += os.WIFSIGNALED(os.wait()[1])
            left = 1000
            assert value_of(load_model(folder, factory)) in range(turn + 2)
        assert killed == 15, killed
        """,
        folder,
    )
    end(child)
    assert not is_tidy(folder)
    assert value_of(load_model(folder, factory)) in range(16)
    save_model(filled(99), folder)
    assert value_of(load_model(folder, factory)) == 99
    assert names_in(folder) == {"notes.txt", "tilewright.json", *read_manifest(folder).shards()}


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(filled(1), tmp_path)
    before = names_in(tmp_path)
    plainly: Callable[..., None] = os.replace

    def fails_at_last(source: Path, target: Path) -> None:
        if re.fullmatch(r"tilewright\.json", Path(target).name):
            raise OSError("disk full")
        plainly(source, target)

    monkeypatch.setattr(os, "replace", fails_at_last)
    with pytest.raises(OSError, match="disk full"):
        save_model(filled(2), tmp_path)
    assert names_in(tmp_path) == before
