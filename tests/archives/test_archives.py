"""What every past version wrote can still be read."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import deltaspec
from deltaspec.errors import DeltaspecError
from deltaspec.spectra.metrics import METRICS
from deltaspec.store.run import VERSION
from tests.archives.make import LOOP, PLACE, merge_sum, train

ARCHIVES = sorted(Path(__file__).parent.glob("v*"))
PAGES = Path(deltaspec.__file__).parent / "store"
FIELD = re.compile(r"`(\w+)`")
DATA = {"files", "modified", "versions", "method_options", "modules", "grown"}  # their keys are names, not fields
CLOCKS = {"folder", "seconds_per_step", "peak_memory"}


def test_every_version_has_an_archive():
    assert [path.name for path in ARCHIVES] == [f"v{i}" for i in range(1, VERSION + 1)]


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name)
def archive(request):
    return request.param


@pytest.fixture
def moved(archive, tmp_path):
    """The archive where it can be written to, its paths those of today; its base as old as its trainings know it."""
    place = tmp_path / "archive"
    shutil.copytree(archive, place)
    for file in place.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(f'"{PLACE}/', f'"{place}/'), encoding="utf-8")
    for name, modified in read(place / "trainings/full/train.json")["base"]["modified"].items():
        os.utime(place / "bert" / name, ns=(modified, modified))
    return place


@pytest.fixture
def trained(moved):
    """The same, for those that run the archived model."""
    pytest.importorskip("transformers", reason="needs the extra train")
    pytest.importorskip("accelerate", reason="needs the extra train")
    return moved


def test_an_old_run_is_read(archive):
    run = deltaspec.Run.load(archive / "run")
    expected = json.loads((archive / "expected.json").read_text())
    assert {record.store_key for record in run.records} == set(expected)
    for key, values in expected.items():
        spectrum = run.spectrum(key)
        assert np.allclose(spectrum.singular_values.numpy(), values, rtol=1e-12)
        assert spectrum.left.shape == (8, 2)
    assert set(METRICS) <= set(run.to_dicts()[0])
    assert run.vectors[0]["relative_norm"] == pytest.approx(0.5)
    assert not run.failures
    assert not run.missing


def test_an_old_trajectory_is_read(archive):
    """Each step's singular values are NumPy's of the archived weights."""
    found = deltaspec.Trajectory.load(archive / "trajectory")
    assert found.steps == [2, 4] and found.complete
    base = load_file(archive / "bert/model.safetensors")
    for step, run in zip(found.steps, found.runs, strict=True):
        place = "final" if step == 4 else "checkpoints/step-00000002"
        tuned = load_file(archive / "trainings/full" / place / "model.safetensors")
        assert len(run.records) == 4
        for record in run.records:
            name = record.store_key
            values = np.linalg.svd((tuned[f"bert.{name}"].double() - base[name].double()).numpy(), compute_uv=False)
            kept = run.spectrum(name).singular_values.numpy()
            assert np.allclose(kept, values, rtol=1e-6, atol=1e-6 * values[0])
    assert {row["step"] for row in found.to_dicts()} == {2, 4}


@pytest.mark.parametrize("name", ["energy", "rank", "params"])
def test_an_old_adapter_is_as_good_as_it_claims(archive, name):
    adapter = archive / "extracted" / name
    claims = json.loads((adapter / "deltaspec.json").read_text())
    options = deltaspec.AnalyzeOptions(device="cpu", vocab="common")
    found = deltaspec.verify(archive / "pair/base", archive / "pair/tuned", adapter, options=options)
    assert found.claims and not found.worse and not found.missing
    errors = {row["matrix"]: row["error"] for row in claims["matrices"]}
    assert {row.matrix: row.error for row in found.rows if row.rank} == pytest.approx(errors, rel=1e-9)
    if name != "energy":  # whose embedding is stored whole, and so has no factors
        assert found.totals.error == pytest.approx(claims["totals"]["error"], rel=1e-9)


def test_an_old_adapter_that_is_worse_than_it_claims_is_found_out(moved):
    file = moved / "extracted/rank/deltaspec.json"
    report = json.loads(file.read_text())
    report["matrices"][1]["error"] *= 0.9
    file.write_text(json.dumps(report))
    options = deltaspec.AnalyzeOptions(device="cpu", vocab="common")
    found = deltaspec.verify(moved / "pair/base", moved / "pair/tuned", file.parent, options=options)
    assert found.worse == (report["matrices"][1]["matrix"],)


def test_old_adapters_are_added_and_merged(moved, tmp_path):
    """The sum is that of the archive, and a merge adds it to the base."""
    made = [(moved / "extracted" / name, weight) for name, weight in (("rank", 1.0), ("params", 0.5))]
    options = deltaspec.ExtractOptions(deltaspec.RankOptions("rank", (2,)))
    (report,) = deltaspec.combine(made, tmp_path / "sum", options=options).values()
    known = json.loads((moved / "extracted/combined/deltaspec.json").read_text())
    assert report["totals"]["energy"] == pytest.approx(known["totals"]["energy"], rel=1e-6)
    deltaspec.merge(moved / "pair/base", [(moved / "extracted/combined", 1.0)], tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    base, merged = (load_file(f / "model.safetensors")[name] for f in (moved / "pair/base", tmp_path / "merged"))
    (row,) = (row for row in known["matrices"] if row["matrix"] == name)
    kept = row["energy"] * (1 - row["error"] ** 2)
    assert float((merged - base).double().square().sum()) == pytest.approx(kept, rel=1e-5)


def test_an_old_merge_would_say_the_same_today(moved, tmp_path):
    """All but the places where things lie."""
    merge_sum(moved, tmp_path / "merged")
    found, known = (read(folder / "deltaspec.json") for folder in (tmp_path / "merged", moved / "merged"))
    assert found.keys() == known.keys()
    assert found["total"] == pytest.approx(known["total"], rel=1e-6)
    assert known["remark"] and min(known["total"].values()) > 0  # there is something to be said
    for row, old in zip(found["matrices"], known["matrices"], strict=True):
        assert row.keys() == old.keys()
        for name, value in old.items():
            assert row[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    for name in ("kind", "dtype", "remark", "notes"):
        assert found[name] == known[name], name
    assert found["base"]["files"] == known["base"]["files"]
    (one,), (old,) = found["adapters"], known["adapters"]
    assert one["weight"] == old["weight"]
    assert one["files"].keys() == old["files"].keys()
    weights = "adapter_model.safetensors"  # the config names a place
    assert one["files"][weights] == old["files"][weights]


def test_old_trainings_are_compared(trained, tmp_path):
    """Today's rows are those that were written then, and the table's."""
    options = deltaspec.CompareOptions(directions=2, device="cpu")
    folders = [trained / "trainings" / name for name in ("full", "lora")]
    rows = deltaspec.compare(folders, tmp_path / "out", options=options)
    known = json.loads((trained / "comparison/compare.json").read_text())
    for row, old in zip(rows, known, strict=True):
        assert old.keys() <= row.keys()
        for name, value in old.items():
            assert row[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    with (trained / "comparison/compare.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    for line, old in zip(table, known, strict=True):
        assert {n: v for n, v in line.items() if n not in CLOCKS} == {
            name: "" if value is None else str(value) for name, value in old.items() if name not in CLOCKS
        }


@pytest.mark.parametrize("name", ["full", "lora"])
def test_an_old_training_is_the_same_training(trained, name):
    """The same call finds it finished, and returns what it reported; with another rate it is another training."""
    report = json.loads((trained / "trainings" / name / "train.json").read_text())
    assert report["finished"]
    assert train(trained, name, trained / "trainings" / name) == report
    with pytest.raises(DeltaspecError, match=r"holds another training \(loop.lr was 0.01, now 0.02\)"):
        train(trained, name, trained / "trainings" / name, loop=replace(LOOP, lr=2e-2))


def test_old_rates_are_tried_again(trained):
    """Their folders are not archived; what each comes to is."""
    known = json.loads((trained / "trainings/rates/train.json").read_text())
    report = train(trained, "rates", trained / "trainings/rates")
    assert report["best"] == known["best"] == "lr-0.01"
    good, bad = report["runs"]
    assert good["results"]["learned"]["loss"] == pytest.approx(known["runs"][0]["results"]["learned"]["loss"], rel=1e-4)
    assert bad["failed"].startswith("Training stopped at step 2") and "results" not in bad


def test_an_old_training_that_was_stopped_goes_on(trained):
    """From its checkpoint, to the weights that the other machine came to without a stop."""
    report = train(trained, "lora", trained / "trainings/stopped")
    whole = json.loads((trained / "trainings/lora/train.json").read_text())
    assert report["finished"] and report["counts"] == whole["counts"]
    assert report["results"]["learned"]["loss"] == pytest.approx(whole["results"]["learned"]["loss"], rel=1e-4)
    found, known = (load_file(trained / f"trainings/{n}/final/adapter_model.safetensors") for n in ("stopped", "lora"))
    assert found.keys() == known.keys()
    for name, tensor in known.items():
        assert np.allclose(found[name].numpy(), tensor.numpy(), atol=1e-4), name
    lines = [json.loads(line) for line in (trained / "trainings/stopped/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "seconds" in line] == [1, 2, 3, 4]


def read(file: Path) -> Any:
    """Return what a file of JSON, or of a line of JSON each, holds."""
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


def fields(content: Any) -> Iterator[str]:
    """Yield every key of an object and of what is in it, where keys are fields."""
    for item in content if isinstance(content, list) else ():
        yield from fields(item)
    for name, value in content.items() if isinstance(content, dict) else ():
        yield name
        inner = list(value.values()) if name in DATA and isinstance(value, dict) else value
        yield from fields(inner)


def described(page: str) -> tuple[set[str], set[str]]:
    """Return the fields in the first column of a page's tables, and those that MAY be there."""
    found, may = set(), set()
    for line in (PAGES / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            first, second = line.split("|")[1:3]
            found |= set(FIELD.findall(first))
            may |= set(FIELD.findall(first)) if "MAY be there" in second else set()
    return found, may


WRITTEN = {
    "format_training.md": [
        "trainings/*/train.json",
        "trainings/*/metrics.jsonl",
        "trainings/*/*/*/resume/position.json",
    ],
    "format_adapter.md": ["extracted/*/deltaspec.json", "merged/deltaspec.json"],
    "format_comparison.md": ["comparison/compare.json"],
}


@pytest.mark.parametrize("page", WRITTEN)
def test_every_field_is_described_and_every_description_has_a_field(page):
    found = set()
    for file in (file for pattern in WRITTEN[page] for file in ARCHIVES[-1].glob(pattern)):
        found |= set(fields(read(file)))
    known, may = described(page)
    assert found
    assert found - known == set()
    assert known - found - may == set()


def test_archives_are_small():
    assert sum(file.stat().st_size for archive in ARCHIVES for file in archive.rglob("*") if file.is_file()) < 300_000
