"""A folder of runs: its manifest, steps that come later, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaspec.errors import RunError
from deltaspec.store.run import Run
from deltaspec.store.trajectory import Trajectory, load_results
from tests.store.test_run import MANIFEST, record

HEAD = {"base": {"ref": "b", "files": {"m": "1"}}, "options": {"vectors": 0}, "deltaspec": "0"}


def manifest(*steps, **changed):
    return {**HEAD, **changed, "checkpoints": [{"step": step, "ref": f"step {step}"} for step in steps]}


def filled(trajectory, step, *names, planned=()):
    run = Run.create_or_resume(trajectory.folder(step), {**MANIFEST, "planned": [*names, *planned]})
    for name in names:
        run.put(*record(name))


def test_steps_are_sorted_and_added(tmp_path):
    found = Trajectory.create_or_resume(tmp_path / "t", manifest(20, 3))
    assert [row["step"] for row in found.manifest["checkpoints"]] == [3, 20]
    assert (found.steps, found.missing, found.failures, found.complete) == ([], [3, 20], {}, False)
    assert found.folder(3).name == "step-00000003"
    changed = {**manifest(10), "checkpoints": [{"step": 10, "ref": "new"}, {"step": 3, "ref": "moved"}]}
    again = Trajectory.create_or_resume(tmp_path / "t", changed)
    assert [(row["step"], row["ref"]) for row in again.manifest["checkpoints"]] == [
        (3, "moved"),
        (10, "new"),
        (20, "step 20"),
    ]
    stored = json.loads((tmp_path / "t" / "trajectory.json").read_text())
    assert stored == again.manifest
    assert (stored["format"], stored["version"]) == ("deltaspec-trajectory", 1)


def test_what_is_done_failed_and_missing(tmp_path):
    found = Trajectory.create_or_resume(tmp_path / "t", manifest(1, 2, 3))
    filled(found, 1, "w", "v")
    filled(found, 3, "w", planned=["v"])
    found.note(2, "it is truncated")
    found = Trajectory.load(tmp_path / "t")
    assert (found.steps, found.failures, found.missing) == ([1, 3], {2: "it is truncated"}, [])
    assert [run.path.name for run in found.runs] == ["step-00000001", "step-00000003"]
    assert repr(found) == f"Trajectory('{tmp_path / 't'}', steps=[1, 3])"
    rows = found.to_dicts()
    assert [(row["step"], row["tensor"]) for row in rows] == [(1, "w"), (1, "v"), (3, "w")]
    assert next(iter(rows[0])) == "step"
    assert found.to_pandas()["step"].tolist() == [1, 1, 3]


def test_complete_is_every_matrix_of_every_step(tmp_path):
    found = Trajectory.create_or_resume(tmp_path / "t", manifest(1, 2))
    filled(found, 1, "w")
    assert not Trajectory.load(found.path).complete  # step 2 is missing
    filled(found, 2, planned=["w"])
    assert not Trajectory.load(found.path).complete  # its matrix is
    run = Run.load(found.folder(2))
    run.put_failure(record("w")[0].key, "w", "NaN")
    assert not Trajectory.load(found.path).complete
    run.put(*record("w"))
    assert Trajectory.load(found.path).complete
    found.note(2, "it is truncated")
    assert not Trajectory.load(found.path).complete
    found.note(2, "")
    assert Trajectory.load(found.path).failures == {}
    assert Trajectory.load(found.path).complete


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base": {"ref": "b", "files": {"m": "2"}}}, r"base\.files\.m was 1, now 2"),
        ({"options": {"vectors": 3}}, r"options\.vectors was 0, now 3"),
        ({"deltaspec": "1"}, "deltaspec was 0, now 1"),
    ],
)
def test_another_base_or_options_are_refused(tmp_path, changed, said):
    Trajectory.create_or_resume(tmp_path, manifest(1))
    Trajectory.create_or_resume(tmp_path, manifest(1, base={"ref": "moved", "files": {"m": "1"}}))
    with pytest.raises(RunError, match=f"a trajectory of something else .*{said}"):
        Trajectory.create_or_resume(tmp_path, manifest(1, **changed))


def test_folders_of_something_else_are_refused_and_leftovers_are_not(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(RunError, match="exists and is no trajectory"):
            Trajectory.create_or_resume(tmp_path / name, manifest(1))
    with pytest.raises(RunError, match="cannot be written"):
        Trajectory.create_or_resume(tmp_path / "file" / "inside", manifest(1))
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "trajectory.json.99999999.tmp").write_text("{")
    assert Trajectory.create_or_resume(tmp_path / "killed", manifest(1)).missing == [1]


def test_a_folder_without_rights_is_said_to_be_unreadable(tmp_path, monkeypatch):
    def denied(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(RunError, match=r"cannot be read \(Permission denied\): pass another one"):
        Trajectory.create_or_resume(tmp_path, manifest(1))
    with pytest.raises(RunError, match=r"cannot be written \(Permission denied\): pass another one"):
        Run.create_or_resume(tmp_path, MANIFEST)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is not a deltaspec trajectory"),
        ('{"format": "deltaspec-run", "version": 1}', "is not a deltaspec trajectory"),
        ('{"format": "deltaspec-trajectory"}', "format version None.* upgrade"),
        ('{"format": "deltaspec-trajectory", "version": 2}', "format version 2, .* up to 1: upgrade"),
    ],
)
def test_what_is_no_trajectory_is_said_to_be_none(content, said, tmp_path):
    if content is not None:
        (tmp_path / "trajectory.json").write_text(content)
    with pytest.raises(RunError, match=said):
        Trajectory.load(tmp_path)


def test_what_analyze_wrote_is_opened_as_what_it_is(tmp_path):
    assert isinstance(load_results(Trajectory.create_or_resume(tmp_path / "t", manifest(1)).path), Trajectory)
    assert isinstance(load_results(Run.create_or_resume(tmp_path / "r", MANIFEST).path), Run)
    with pytest.raises(RunError, match=r"holds no manifest\.json"):
        load_results(tmp_path)
