"""Files and folders whole or not at all, durable or quick, and whose leftovers are whose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltaspec.errors import RunError
from deltaspec.files import atomic
from deltaspec.files.atomic import is_alive, is_leftover, whole_file, whole_folder, write_whole


@pytest.fixture
def synced(monkeypatch):
    """How often the disk was waited for."""
    calls = []
    monkeypatch.setattr(atomic.os, "fsync", calls.append)
    return calls


@pytest.mark.parametrize("durable", [True, False])
def test_a_result_waits_for_the_disk_and_a_record_does_not(durable, synced, tmp_path):
    write_whole(tmp_path / "deep" / "x.json", b"{}", durable=durable)
    assert (tmp_path / "deep" / "x.json").read_bytes() == b"{}"
    assert len(synced) == durable


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyError), whole_file(tmp_path / "x") as stream:
        stream.write(b"new")
        raise KeyError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_what_the_system_refuses_is_said_as_the_caller_says_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="Not a directory|exists"):
        write_whole(tmp_path / "file" / "x", b"")
    with pytest.raises(RunError, match="no room in x"):
        write_whole(tmp_path / "file" / "x", b"", refusal=lambda path, _: RunError(f"no room in {path.name}"))


def test_a_folder_comes_whole_and_replaces_an_older_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RunError), whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
        raise OSError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    with whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_process_is_alive_until_it_ended():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert is_alive(os.getpid()) and is_alive(1)
    assert not is_alive(ended.pid) and not is_alive(10**30)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("w.safetensors.{gone}.tmp", True),
        ("w.safetensors.{own}.tmp", True),
        ("w.json.{gone}.tmp", True),
        (f"w.json.{10**30}.tmp", True),  # no system's number: nothing runs under it
        ("w.json.{own}.tmp", True),  # this process writes nothing now
        ("w.json.{parent}.tmp", False),
        ("w.json.1.tmp", False),
        ("w.txt.{gone}.tmp", False),
        ("w.json.tmp", False),
        ("w.json.{gone}.tmp.old", False),
    ],
)
def test_leftovers_are_of_processes_that_are_gone(name, ours, tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    path = tmp_path / name.format(gone=int(gone.stdout), own=os.getpid(), parent=os.getppid())
    assert is_leftover(path) is ours


def test_a_write_is_whole_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "new" / "a.json"
    write_whole(target, b"one")
    write_whole(target, b"two")
    assert target.read_bytes() == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]
    seen = []
    monkeypatch.setattr(type(target), "replace", lambda self, other: seen.append((self.name, self.read_bytes(), other)))
    write_whole(target, b"three")
    assert seen == [(f"a.json.{os.getpid()}.tmp", b"three", target)]
    assert target.read_bytes() == b"two"
