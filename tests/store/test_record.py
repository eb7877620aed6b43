"""Files of a run: their names, how they are written, and what killed writes leave."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltaspec.files.atomic import is_leftover, write_atomically
from deltaspec.store.record import LONGEST_NAME, file_stem


@pytest.mark.parametrize("length", [LONGEST_NAME - 1, LONGEST_NAME, LONGEST_NAME + 1])
def test_names_are_hashed_beyond_a_length_and_not_before(length):
    stem = file_stem("x" * length)
    assert (stem == "x" * length) == (length <= LONGEST_NAME)
    assert len(stem) == (length if length <= LONGEST_NAME else 140 + 1 + 24)
    assert file_stem("a/b") == "a%2Fb"


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("w.safetensors.{gone}.tmp", True),
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
    write_atomically(target, b"one")
    write_atomically(target, b"two")
    assert target.read_bytes() == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]
    seen = []
    monkeypatch.setattr(type(target), "replace", lambda self, other: seen.append((self.name, self.read_bytes(), other)))
    write_atomically(target, b"three")
    assert seen == [(f"a.json.{os.getpid()}.tmp", b"three", target)]
    assert target.read_bytes() == b"two"
