"""What is written has the keys that store.formats says, no more and no fewer."""

from __future__ import annotations

import json
import types
import typing

import pytest

from deltaspec.options import AnalyzeOptions, CompareOptions, ExtractOptions, RankOptions
from deltaspec.store.formats import adapter, comparison, run, training
from deltaspec.workflows.analysis.analyze import analyze
from deltaspec.workflows.analysis.trajectory import trajectory
from deltaspec.workflows.comparison.compare import compare
from deltaspec.workflows.extraction.combine import combine
from deltaspec.workflows.extraction.extract import extract
from deltaspec.workflows.merging.merge import merge
from tests.workflows.training.train_case import CLASSES, write_case
from tests.workflows.training.train_case import run as teach

CPU = AnalyzeOptions(device="cpu")


def check(value, kind, where="$"):
    """Compare plain data with an annotation: TypedDicts key by key, the rest by its type."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        needed = {name for name, hint in hints.items() if typing.get_origin(hint) is not typing.NotRequired}
        assert needed <= value.keys() <= hints.keys(), (where, value.keys() ^ hints.keys())
        for name, found in value.items():
            check(found, hints[name], f"{where}.{name}")
    elif origin is typing.NotRequired:
        check(value, inside[0], where)
    elif origin in (typing.Union, types.UnionType):
        assert any(fits(value, one) for one in inside), (where, value)
    elif origin is list:
        assert isinstance(value, list), where
        for number, found in enumerate(value):
            check(found, inside[0], f"{where}[{number}]")
    elif origin is dict:
        assert isinstance(value, dict), where
        for name, found in value.items():
            check(found, inside[1], f"{where}.{name}")
    elif kind is float:
        assert isinstance(value, int | float) and not isinstance(value, bool), (where, value)
    else:
        assert isinstance(value, kind), (where, value)


def fits(value, kind):
    try:
        check(value, kind)
    except (AssertionError, AttributeError):
        return False
    return True


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = write_case(tmp_path_factory.mktemp("formats"), "bert")
    more = {"forget": place / "other.csv", "forget_data": CLASSES}
    teach(place, place / "full", method="full", run={"checkpoint_every": 3}, **more)
    teach(place, place / "lora", rates=[1e-3, 1e-2], **more)
    return place


def test_a_run_and_its_vectors(root, tmp_path):
    found = analyze(root / "bert", root / "full" / "final", tmp_path / "run", options=CPU)
    check(read(tmp_path / "run" / "manifest.json"), run.Manifest)
    rows = read(tmp_path / "run" / "vectors.json")
    assert rows
    check(rows, list[run.VectorRow])
    found.put_failure(found.records[0].key, "a key", "why")
    (failed,) = (tmp_path / "run").glob("matrices/*/*.failed.json")
    check(read(failed), run.FailedRecord)


def test_a_run_of_an_attached_adapter_and_a_trajectory(root, tmp_path):
    teach(root, root / "vera", method="vera", method_options={"rank": 4})
    analyze(root / "bert", root / "vera" / "final", tmp_path / "run", options=CPU)
    manifest = read(tmp_path / "run" / "manifest.json")
    check(manifest, run.Manifest)
    assert manifest["tuned"]["live"] is True
    trajectory(root / "bert", [root / "full"], tmp_path / "all", options=CPU)
    check(read(tmp_path / "all" / "trajectory.json"), run.TrajectoryManifest)


def test_a_training(root):
    whole = read(root / "lora" / "train.json")
    for report in (read(root / "full" / "train.json"), whole, read(root / "lora" / whole["best"] / "train.json")):
        check(report, training.TrainingReport)
    assert "results" not in whole and "runs" in whole
    lines = [json.loads(line) for line in (root / "full" / "metrics.jsonl").read_text().splitlines()]
    assert {"eval", "forget", "loss"} <= {name for line in lines for name in line}
    check(lines, list[training.MetricsLine])


def test_adapters_and_a_merge(root, tmp_path):
    for name, ranks in (("rank", RankOptions(amounts=(2,))), ("params", RankOptions("params", (4000,)))):
        extract(root / "bert", root / "full" / "final", tmp_path / name, options=ExtractOptions(ranks, analysis=CPU))
        check(read(tmp_path / name / "deltaspec.json"), adapter.AdapterReport)
    assert read(tmp_path / "params" / "deltaspec.json")["budget"]
    combine([(tmp_path / "rank", 0.5)], tmp_path / "half", options=ExtractOptions(RankOptions(amounts=(1,))))
    check(read(tmp_path / "half" / "deltaspec.json"), adapter.AdapterReport)
    merge(root / "bert", [tmp_path / "rank"], tmp_path / "merged")
    check(read(tmp_path / "merged" / "deltaspec.json"), adapter.MergedReport)


def test_a_comparison(root, tmp_path):
    compare([root / "full", root / "lora"], tmp_path, options=CompareOptions(directions=2))
    check(read(tmp_path / "compare.json"), list[comparison.ComparisonRow])


def test_the_check_itself_bites():
    row = {"key": "k", "message": "m"}
    check(row, run.FailedRecord)
    for wrong in ({"key": "k"}, {**row, "more": 1}, {**row, "message": None}):
        assert not fits(wrong, run.FailedRecord)
