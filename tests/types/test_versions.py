"""Work begun by a version that computes the same is finished, not refused or begun again."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from deltaspec.errors import RunError
from deltaspec.io.staging import Staging
from deltaspec.store.run import Run
from deltaspec.types.versions import SAME, numbers_of

MANIFEST = {"base": {"files": {"m": "1"}}, "tuned": {"files": {"m": "2"}}, "options": {}}


def test_a_run_of_the_version_before_is_resumed_and_one_of_other_numbers_refused(tmp_path):
    Run.create_or_resume(tmp_path, MANIFEST | {"deltaspec": "0.1.0"})
    again = Run.create_or_resume(tmp_path, MANIFEST | {"deltaspec": "0.2.0"})
    assert again.manifest["deltaspec"] == "0.1.0"
    with pytest.raises(RunError, match=r"deltaspec was 0\.1\.0, now 9\.9"):
        Run.create_or_resume(tmp_path, MANIFEST | {"deltaspec": "9.9"})


def test_a_killed_write_of_the_version_before_is_found_again(tmp_path):
    places = [
        Staging(tmp_path / "out", identity={"a": 1, "deltaspec": version}, overwrite=False).path
        for version in ("0.1.0", "0.2.0", "9.9")
    ]
    assert places[0] == places[1] != places[2]
    assert Staging(tmp_path / "out", identity={"a": 1}, overwrite=False).path not in places


def test_this_version_is_judged_and_chains_end():
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    newest = project["project"]["version"]
    assert not any(numbers_of(first) != first for first in SAME.values())
    assert newest in SAME, "add it to SAME, or to a list here of versions that changed numbers"
