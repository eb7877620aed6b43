"""The run directory: what goes in comes out, and what does not belong is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from deltaspec.errors import RunError
from deltaspec.spectra.evidence import Evidence
from deltaspec.spectra.metrics import METRICS, measure
from deltaspec.store.record import LONGEST_NAME, file_stem
from deltaspec.store.run import Run
from deltaspec.types import MatrixKey, MatrixRecord, Spectrum

MANIFEST = {
    "base": {"ref": "b", "files": {"m": "1"}},
    "tuned": {"ref": "t", "files": {"m": "2"}},
    "options": {"vectors": 0},
}
HOSTILE = ["../../etc/passwd", "a/../b", ".", "..", "con\x00trol", "x" * 5000, "Ü/ж", "a b%2F", "-rf", ""]


def record(tensor, *, depth=0, spectrum_of="delta"):
    spectrum = Spectrum(torch.tensor([2.0, 1.0, 1e-300], dtype=torch.float64), (3, 4), 5.0, "gram64+numpy", 1e-9)
    key = MatrixKey(tensor, "", "q_proj", depth, None, "encoder")
    metrics = measure(Evidence(spectrum, base_norm=7.0))
    return MatrixRecord(
        key, (3, 4), "F32", "BF16", spectrum_of, metrics, "gram64+numpy", 1e-9, 0.5, "cpu", ("a note",)
    ), spectrum


def test_a_record_comes_back_bit_for_bit(tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    put, spectrum = record("w")
    run.put(put, spectrum)
    loaded = Run.load(tmp_path / "run")
    assert loaded.records == [put]
    assert torch.equal(loaded.spectrum("w").singular_values, spectrum.singular_values)
    assert loaded.spectrum("w").energy == 5.0
    row = loaded.to_dicts()[0]
    first = [
        "tensor",
        "part",
        "role",
        "depth",
        "expert",
        "stack",
        "d_out",
        "d_in",
        "base_dtype",
        "tuned_dtype",
        "spectrum_of",
    ]
    assert list(row) == [*first, *METRICS, "method", "error_bound"]
    frame = loaded.to_pandas()
    assert frame.shape == (1, len(row))
    assert frame["frobenius_norm"][0] == put.metrics["frobenius_norm"]


def test_vectors_of_a_spectrum_are_kept_in_single_precision(tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    put, spectrum = record("w", spectrum_of="base")
    left, right = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64).mT
    run.put(put, replace(spectrum, left=left, right=right))
    found = Run.load(run.path).spectrum("w#base")
    assert torch.equal(found.left, left.float())
    assert torch.equal(found.right, right.float())
    assert (found.shape, found.method, found.error_bound) == ((3, 4), "gram64+numpy", 1e-9)
    run.put(put, spectrum)
    assert Run.load(run.path).spectrum("w#base").left is None
    assert Run.load(run.path).records == [put]  # read again where it was cached before it was written


def test_records_are_in_the_order_of_the_plan_and_what_is_not_planned_comes_last(tmp_path):
    names = ["b", "c", "a", "none"]
    run = Run.create_or_resume(tmp_path / "run", {**MANIFEST, "planned": names[:3], "skipped": [{"tensor": "x"}]})
    for name in reversed(names):
        run.put(*record(name, depth=None if name == "none" else 1))
    loaded = Run.load(run.path)
    assert [one.key.tensor for one in loaded.records] == names
    assert (loaded.missing, loaded.skipped, loaded.vectors) == ([], [{"tensor": "x"}], [])
    assert {path.name for path in (run.path / "matrices").iterdir()} == {"1", "none"}
    rows = [{"tensor": "norm", "base_norm": 1.5}]
    run.put_vectors(rows)
    assert Run.load(run.path).vectors == rows
    assert repr(run) == f"Run('{run.path}')"


def test_records_of_another_run_are_copied_where_they_are_missing(tmp_path):
    mine, other = (Run.create_or_resume(tmp_path / name, MANIFEST) for name in ("mine", "other"))
    (own, spectrum), (theirs, _), (gone, _) = (record(name) for name in ("own", "theirs", "gone"))
    mine.put(own, spectrum)
    other.put(replace(own, seconds=9.0), spectrum)
    other.put(theirs, spectrum)
    mine.adopt(other, [(one.key, one.store_key) for one in (own, theirs, gone)])
    found = {one.key.tensor: one.seconds for one in Run.load(mine.path).records}
    assert found == {"own": own.seconds, "theirs": theirs.seconds}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_tensor_name_leaves_the_run(name, tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    put, spectrum = record(name)
    run.put(put, spectrum)
    assert Run.load(tmp_path / "run").records[0].key.tensor == name
    inside = {path for path in (tmp_path / "run" / "matrices").rglob("*") if path.is_file()}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - inside == {tmp_path / "run" / "manifest.json"}


def test_long_names_that_share_their_beginning_stay_apart():
    stems = {file_stem("x" * 500 + str(i)) for i in range(3)}
    assert len(stems) == 3
    assert all(len(stem) <= LONGEST_NAME for stem in stems)


def test_a_failure_is_kept_until_its_matrix_succeeds(tmp_path):
    run = Run.create_or_resume(tmp_path / "run", {**MANIFEST, "planned": ["w", "v"]})
    put, spectrum = record("w")
    run.put_failure(put.key, "w", "it holds NaN")
    assert Run.load(run.path).failures == {"w": "it holds NaN"}
    assert Run.load(run.path).missing == ["v"]
    assert not run.has(put.key, "w")
    run.put(put, spectrum)
    assert Run.load(run.path).failures == {}


def test_other_contents_or_options_are_refused_with_the_difference(tmp_path):
    Run.create_or_resume(tmp_path / "run", MANIFEST)
    Run.create_or_resume(tmp_path / "run", {**MANIFEST, "base": {"ref": "moved", "files": {"m": "1"}}})
    with pytest.raises(RunError, match=r"options\.vectors was 0, now 3"):
        Run.create_or_resume(tmp_path / "run", {**MANIFEST, "options": {"vectors": 3}})
    with pytest.raises(RunError, match=r"tuned\.files\.m was 2, now 9"):
        Run.create_or_resume(tmp_path / "run", {**MANIFEST, "tuned": {"ref": "t", "files": {"m": "9"}}})


def test_leftovers_of_a_killed_write_go_and_are_no_records(tmp_path):
    """Ours and of a process that is gone; a live process's and a user's files stay."""
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    folder = run.path / "matrices" / "0"
    folder.mkdir(parents=True)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    leftover = folder / f"w.safetensors.{int(dead.stdout)}.tmp"
    kept = [folder / f"w.safetensors.{os.getppid()}.tmp", folder / "notes.tmp"]
    for file in (leftover, *kept):
        file.write_bytes(b"half")
    assert Run.load(tmp_path / "run").records == []
    Run.create_or_resume(tmp_path / "run", MANIFEST)
    assert not leftover.exists()
    assert all(file.exists() for file in kept)


def test_killed_before_its_manifest_a_run_begins_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json.99999999.tmp").write_text("{")
    assert Run.create_or_resume(tmp_path / "run", MANIFEST).records == []


def test_a_damaged_record_is_computed_again(tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    put, spectrum = record("w")
    for content in (b"", b"x" * 40):
        run.put(put, spectrum)
        file = next(run.path.glob("matrices/*/*"))
        assert run.has(put.key, "w")
        file.write_bytes(content)
        assert not run.has(put.key, "w")
        assert not file.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no manifest.json"),
        ("{", "cannot be read"),
        ("[]", "is not a deltaspec run"),
        ('{"format": "other"}', "is not a deltaspec run"),
        ('{"format": "deltaspec-run"}', "format version None, .* upgrade"),
        ('{"format": "deltaspec-run", "version": 2}', "format version 2, this deltaspec reads up to 1: upgrade"),
    ],
)
def test_what_is_no_run_is_said_to_be_none(content, said, tmp_path):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=said):
        Run.load(tmp_path)


def test_a_folder_of_something_else_is_not_filled(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(RunError, match="is not a run directory"):
            Run.create_or_resume(folder, MANIFEST)
    with pytest.raises(RunError, match="cannot be written"):
        Run.create_or_resume(tmp_path / "thesis.tex" / "inside", MANIFEST)


def test_a_damaged_record_names_its_file(tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    put, spectrum = record("w")
    run.put(put, spectrum)
    file = next(run.path.glob("matrices/*/*"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RunError, match="w.safetensors"):
        _ = Run.load(run.path).records


def test_an_unknown_key_is_named(tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    with pytest.raises(RunError, match="no record 'x'"):
        run.spectrum("x")


def test_the_manifest_is_plain_json(tmp_path):
    run = Run.create_or_resume(tmp_path / "run", MANIFEST)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("deltaspec-run", 1)
