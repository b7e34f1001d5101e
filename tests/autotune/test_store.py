"""Tables on disk: what several writers, killed ones, bad files and read-only folders leave behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from tests.autotune.toys import DEVICE
from tilewright.autotune import store, tables
from tilewright.autotune.device import DeviceKind
from tilewright.autotune.lock import locked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes of these tests are forked")


def write_entries(path: Path, name: str, count: int) -> None:
    """Add entries one by one, for ever where the count is 0."""
    for i in itertools.count() if not count else range(count):
        store.add_entries(path, DEVICE, {f"{name}{i}": {"config": {"block": i, "padding": "x" * 2000}}})


def writer(path: Path, name: str, count: int) -> multiprocessing.process.BaseProcess:
    """A process of its own. Forked: a fresh one would spend seconds on importing torch."""
    process = multiprocessing.get_context("fork").Process(target=write_entries, args=(path, name, count))
    process.start()
    return process


def entry(block: int = 16) -> store.Entry:
    return {"config": {"block": block}}


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path):
    path = tmp_path / "table.json"
    writers = [writer(path, name, 25) for name in ("a", "b", "c")]
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0, 0, 0]
    assert set(store.read_table(path)) == {f"{name}{i}" for name in "abc" for i in range(25)}


def test_killed_while_writing_leaves_a_whole_table_and_no_lock(tmp_path: Path):
    path = tmp_path / "table.json"
    seen = 0
    for round_number in range(4):
        process = writer(path, f"r{round_number}-", 0)
        while not path.exists() or len(store.read_table(path)) < seen + 3 + round_number:
            time.sleep(0.001)
        process.kill()
        process.join()
        found = store.read_table(path)
        assert len(found) >= seen
        seen = len(found)
        with locked(path.with_name(path.name + ".lock"), patience=0):
            pass
        after = store.add_entries(path, DEVICE, {f"after{round_number}": entry()})
        assert len(after) == seen + 1
        seen += 1
        assert list(tmp_path.glob(".*.tmp")) == []  # of the killed one: the next writer removed it


def add_and_say(path: Path, name: str, said: multiprocessing.connection.Connection) -> None:
    """Add entries one by one for ever and say each that is in the table."""
    for i in itertools.count():
        store.add_entries(path, DEVICE, {f"{name}-{i}": {"config": {"block": i}}})
        said.send_bytes(f"{name}-{i}".encode())


def test_two_writers_killed_again_and_again_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # That a table survives a loss of power is not tested here, and takes most of the time of a write.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path, fork, draw = tmp_path / "table.json", multiprocessing.get_context("fork"), random.Random(0)
    said: set[str] = set()
    for round_number in range(200):
        pairs = []
        for name in ("a", "b"):
            reader, writer_end = fork.Pipe(duplex=False)
            process = fork.Process(target=add_and_say, args=(path, f"{name}{round_number}", writer_end))
            process.start()
            writer_end.close()
            pairs.append((process, reader))
        time.sleep(draw.uniform(0.0, 0.02))
        for process, reader in pairs:
            process.kill()
            process.join()
            with contextlib.suppress(EOFError):
                while True:
                    said.add(reader.recv_bytes().decode())
            reader.close()
    after = store.add_entries(path, DEVICE, {"after": entry()})
    assert said <= set(after) and len(said) > 100
    assert list(tmp_path.glob(".*.tmp")) == [] and not list(tmp_path.glob("*.bad"))


def test_a_reader_never_sees_half_a_table(tmp_path: Path):
    path = tmp_path / "table.json"
    process = writer(path, "a", 40)
    counts = []
    while process.is_alive():
        counts.append(len(store.read_table(path)))  # raises TableError for half a table
    assert counts == sorted(counts)
    assert len(store.read_table(path)) == 40


GARBAGE = {
    "empty": b"",
    "torn": b'{"format": 1, "entries": {"a": {"config": {"bl',
    "zeros": b"\0" * 4096,
    "no text": b"\xff\xfe\x00garbage",
    "a list": b"[]",
    "no entries": b'{"format": 1}',
    "entries of another kind": b'{"format": 1, "entries": {"a": 3}}',
    "no config": b'{"format": 1, "entries": {"a": {}}}',
    "nested config": b'{"format": 1, "entries": {"a": {"config": {"x": {"y": 1}}}}}',
    "another version": b'{"format": 2, "entries": {}}',
    "NaN": b'{"format": 1, "entries": {"a": {"config": {"x": NaN}}}}',
    "deep": b"[" * 100_000,
    "huge integer": b'{"format": 1, "entries": {"a": {"config": {"x": ' + b"9" * 10_000 + b"}}}}",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_bad_file_is_set_aside_with_a_warning(tmp_path: Path, content: bytes):
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"set aside as table\.json\.bad"):
        assert store.read_or_set_aside(path) == {}
    assert not path.exists() and path.with_name("table.json.bad").read_bytes() == content
    store.add_entries(path, DEVICE, {"a": entry()})
    assert store.read_table(path) == {"a": entry()}


def test_a_file_that_is_too_large_or_has_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.json"
    store.add_entries(path, DEVICE, {str(i): entry() for i in range(20)})
    monkeypatch.setattr(store, "MAX_ENTRIES", 10)
    with pytest.raises(store.TableError, match="20 entries, more than 10"):
        store.read_table(path)
    monkeypatch.setattr(store, "MAX_BYTES", 10)
    with pytest.raises(store.TableError, match="larger than 10 bytes"):
        store.read_table(path)


def test_the_oldest_entries_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "MAX_ENTRIES", 3)
    entries = {f"e{i}": {**entry(), "date": f"2026-01-0{i}"} for i in range(1, 6)}
    assert set(store.add_entries(tmp_path / "t.json", DEVICE, entries)) == {"e3", "e4", "e5"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("folder.json", "pipe.json"):
        with pytest.warns(RuntimeWarning, match="it is not a file"):
            assert store.read_or_set_aside(tmp_path / name) == {}


def test_the_lock_is_waited_for_and_given_up_with_words(tmp_path: Path):
    path = tmp_path / "x.lock"
    with locked(path), pytest.raises(TimeoutError, match="has been locked for 0.05 seconds"), locked(path, 0.05):
        pass
    with locked(path, 0.05):
        pass


def test_entries_survive_the_process_and_versions_keep_to_themselves(folder: Path):
    facts = {"m": 16}
    tables.remember(DEVICE, {tables.key_of("k", facts, DEVICE.driver, "abc"): entry(32)})
    path = tables.table_path(DEVICE)
    assert path.parent == folder and path.name == "toy-9000-sm-90-x132.v1.json"
    other = path.with_name(path.name.replace("v1", "v2"))
    other.write_text("a newer version's")
    tables.forget_tables()
    assert tables.lookup(DEVICE, "k", facts, "abc") == (entry(32), "user")
    for device, name, about, source in (
        (DeviceKind("Toy 9000", "sm_90", 132, "1.2.4"), "k", facts, "abc"),  # another driver
        (DeviceKind("Toy 9001", "sm_90", 132, "1.2.3"), "k", facts, "abc"),
        (DeviceKind("Toy 9000", "sm_90", 114, "1.2.3"), "k", facts, "abc"),
        (DeviceKind("Toy 9000", "sm_100", 132, "1.2.3"), "k", facts, "abc"),
        (DEVICE, "k", {"m": 32}, "abc"),
        (DEVICE, "k", facts, "changed"),
    ):
        assert tables.lookup(device, name, about, source) is None
    assert other.read_text() == "a newer version's"


def test_another_triton_has_entries_of_its_own(monkeypatch: pytest.MonkeyPatch):
    tables.remember(DEVICE, {tables.key_of("k", {}, DEVICE.driver, "abc"): entry()})
    monkeypatch.setattr(tables, "triton_version", lambda: "99.0")
    assert tables.lookup(DEVICE, "k", {}, "abc") is None


def test_what_another_process_wrote_is_seen(folder: Path):
    assert tables.lookup(DEVICE, "k", {}, "abc") is None
    store.add_entries(tables.table_path(DEVICE), DEVICE, {tables.key_of("k", {}, DEVICE.driver, "abc"): entry()})
    assert tables.lookup(DEVICE, "k", {}, "abc") == (entry(), "user")


def test_a_home_that_cannot_be_written_warns_once_and_keeps_the_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("no folder can be made below a file")
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "file" / "tables"))
    key = tables.key_of("k", {}, DEVICE.driver, "abc")
    with pytest.warns(RuntimeWarning, match="kept for this process only"):
        tables.remember(DEVICE, {key: entry(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables.remember(DEVICE, {key: entry(2)})
    assert tables.lookup(DEVICE, "k", {}, "abc") == (entry(2), "user")


#: Who may write nothing: an administrator's processes become this user, since no mode of a file stops them.
NOBODY = 65534


def use_read_only(home: Path, told: multiprocessing.connection.Connection) -> None:
    """In a process of its own: tune once more where the folder below ``home`` cannot be written."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.environ["HOME"] = str(home)
    for name in ("TILEWRIGHT_CACHE_DIR", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    tables.forget_tables()
    known = tables.lookup(DEVICE, "k", {}, "abc")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in (2, 3):
            tables.remember(DEVICE, {tables.key_of("l", {}, DEVICE.driver, "abc"): entry(block)})
    told.send((known, tables.lookup(DEVICE, "l", {}, "abc"), [str(one.message) for one in caught]))


@pytest.mark.parametrize("has_table", [True, False], ids=["with a table", "without"])
def test_a_read_only_home(has_table: bool):
    """Real permissions, of a home below a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as made:
        home = Path(made) / "home"
        folder = home / ".cache" / "tilewright"
        home.mkdir()
        if has_table:
            folder.mkdir(parents=True)
            key = tables.key_of("k", {}, DEVICE.driver, "abc")
            store.add_entries(tables.table_path(DEVICE, folder), DEVICE, {key: entry(1)})
        everything = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
        for path in (home, *home.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        Path(made).chmod(0o755)
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=use_read_only, args=(home, there))
        try:
            process.start()
            assert here.poll(30)
            known, tuned, words = here.recv()
            process.join(30)
        finally:
            for path in (home, *home.rglob("*")):
                path.chmod(0o755)
        assert known == ((entry(1), "user") if has_table else None)
        assert tuned == (entry(3), "user")  # for this process
        assert len(words) == 1 and "kept for this process only" in words[0] and "Permission denied" in words[0]
        assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == everything


def test_a_bad_file_in_a_read_only_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.json"
    path.write_bytes(b"torn")

    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(RuntimeWarning, match="was ignored"):
        assert store.read_or_set_aside(path) == {}
    assert path.read_bytes() == b"torn"


def test_a_disk_that_is_full_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.json"
    store.add_entries(path, DEVICE, {"a": entry()})
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        store.add_entries(path, DEVICE, {"b": entry()})
    assert path.read_bytes() == before and list(tmp_path.glob(".*.tmp")) == []


def test_shipped_tables_are_read_first_and_overridden(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tables.folders, "SHIPPED", shipped)
    tables.forget_tables()
    tables.remember(DEVICE, {tables.key_of("k", {}, DEVICE.driver, "abc"): entry(64)})
    path = tables.table_path(DEVICE)
    assert tables.export_table(path, tables.table_path(DEVICE, shipped), shipped=True) == 1
    assert tables.clear_tables() == (1, 1, 0) and not path.exists()
    newer = DeviceKind(DEVICE.name, DEVICE.arch, DEVICE.units, "9.9.9")
    for device in (DEVICE, newer):  # shipped ones hold for every driver
        assert tables.lookup(device, "k", {}, "abc") == (entry(64), "shipped")
    tables.remember(DEVICE, {tables.key_of("k", {}, DEVICE.driver, "abc"): entry(16)})
    assert tables.lookup(DEVICE, "k", {}, "abc") == (entry(16), "user")


def test_export_and_import(folder: Path, tmp_path: Path):
    key = tables.key_of("k", {}, DEVICE.driver, "abc")
    tables.remember(DEVICE, {key: entry(64)})
    copy = tmp_path / "copy.json"
    assert tables.export_table(tables.table_path(DEVICE), copy) == 1
    with pytest.raises(FileExistsError):
        tables.export_table(tables.table_path(DEVICE), copy)
    tables.clear_tables()
    tables.remember(DEVICE, {"mine": entry(1)})
    assert tables.import_table(copy) == (tables.table_path(DEVICE), 1)
    assert set(store.read_table(tables.table_path(DEVICE))) == {"mine", key}
    copy.write_text('{"format": 1, "entries": {}, "device": {"name": "../../x"}}')
    with pytest.raises(store.TableError, match="which device"):
        tables.import_table(copy)


def test_a_device_name_cannot_lead_out_of_the_folder(folder: Path):
    hostile = DeviceKind("../../etc/passwd\0\n", "sm_90", 1, "")
    assert tables.table_path(hostile).parent == folder
    assert tables.table_path(hostile).name == "etc-passwd-sm-90-x1.v1.json"
