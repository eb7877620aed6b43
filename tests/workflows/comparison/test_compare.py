"""Trainings side by side: every column against NumPy in float64, from the files alone."""

from __future__ import annotations

import csv
import json
import shutil
from statistics import mean, median

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deltaspec.errors import OptionError, RunError
from deltaspec.options import CompareOptions
from deltaspec.spectra.subspaces import random_change
from deltaspec.store.pieces import Pieces
from deltaspec.workflows.analysis import analyze
from deltaspec.workflows.comparison import change_measures
from deltaspec.workflows.comparison.compare import compare
from deltaspec.workflows.comparison.finished_trainings import make_labels
from tests.tiny_models import build, save
from tests.workflows.training.train_case import CLASSES, run, write_case

TOP = 4  # directions
TRAININGS = {
    "full": {"method": "full", "run": {"checkpoint_every": 2}},
    "full-1": {"method": "full", "loop": {"seed": 1}},
    "lora": {"method_options": {"rank": 2}, "rates": [1e-3, 1e-1]},
    "dora": {"method_options": {"rank": 6, "dora": True}, "loop": {"lr": 1.0, "seed": 1}},
    "vera": {"method": "vera", "method_options": {"rank": 8}, "loop": {"lr": 0.3}},
    "bitfit": {"method": "bitfit"},
    "last": {"method": "last_layers", "method_options": {"blocks": 1}},
    "series": {"method": "series"},
}
CHANGES = [name for name in TRAININGS if name not in ("bitfit", "series")]


def teach(root, name, **more):
    """One of TRAININGS, of three steps."""
    given = {**TRAININGS[name], **more}
    given["loop"] = {"steps": 3, **given.get("loop", {})}
    return run(root, root / name, forget=root / "other.csv", forget_data=CLASSES, **given)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = write_case(tmp_path_factory.mktemp("case"))
    save(build("bert", hidden_size=32, intermediate_size=48), place / "bert")
    for name in TRAININGS:
        teach(place, name)
    return place


@pytest.fixture(scope="module")
def folders(root):
    return [root / name for name in TRAININGS]


@pytest.fixture(scope="module")
def rows(root, folders):
    found = compare(folders, root / "compared", options=CompareOptions(directions=TOP))
    return dict(zip(TRAININGS, found, strict=True))


def read(file):
    return {name: tensor.double().numpy() for name, tensor in load_file(file).items()}


def best_of(place):
    """The folder of the best of several rates: by accuracy, then by loss."""
    runs = json.loads((place / "train.json").read_text())["runs"]
    learned = {row["folder"]: row["results"]["learned"] for row in runs}
    return min(learned, key=lambda folder: (-learned[folder]["accuracy"], learned[folder]["loss"]))


def changes_of(root, name):
    """Matrices of the base by name: W and ΔW, float64, as the method's paper has it."""
    base = {key: value for key, value in read(root / "bert/model.safetensors").items() if value.ndim == 2}
    place = root / name / ("" if name != "lora" else best_of(root / name)) / "final"
    if TRAININGS[name].get("method", "lora") in ("full", "last_layers", "bitfit"):
        tuned = read(place / "model.safetensors")
        return {key: (value, tuned[f"bert.{key}"] - value) for key, value in base.items()}
    stored, config = (
        read(place / "adapter_model.safetensors"),
        json.loads((place / "adapter_config.json").read_text()),
    )
    found = {}
    for key, weight in base.items():
        at = f"base_model.model.bert.{key.removesuffix('.weight')}"
        if name == "vera" and f"{at}.vera_lambda_b" in stored:
            down = stored["base_model.vera_A"][:, : weight.shape[1]] * stored[f"{at}.vera_lambda_d"][:, None]
            up = stored["base_model.vera_B"][: weight.shape[0]] * stored[f"{at}.vera_lambda_b"][:, None]
            found[key] = (weight, up @ down)
        elif f"{at}.lora_A.weight" in stored:
            update = stored[f"{at}.lora_B.weight"] @ stored[f"{at}.lora_A.weight"] * config["lora_alpha"] / config["r"]
            if name == "dora":
                summed = weight + update
                lengths = np.linalg.norm(summed, axis=1, keepdims=True)
                update = stored[f"{at}.lora_magnitude_vector"][:, None] / lengths * summed - weight
            found[key] = (weight, update)
    return found


def directions(delta, left=False):
    """The top singular vectors that are there at all."""
    u, s, vt = np.linalg.svd(delta)
    count = min(TOP, int((s > s[0] * max(delta.shape) * 2.0**-23).sum()))
    return u[:, :count] if left else vt[:count].T


def count_intruders(weight, delta):
    u, s, _ = np.linalg.svd(weight + delta, full_matrices=False)
    own = np.linalg.svd(weight, full_matrices=False)[0]
    alone = np.abs(own.T @ u[:, :10]).max(0) < 0.5
    return int(alone.sum()), float((s[: len(alone)][alone] ** 2).sum() / (s**2).sum())


def expect(root, name, reference):
    """The columns of one training's ΔW."""
    found, other = changes_of(root, name), changes_of(root, reference)
    columns = {key: [] for key in ("relative_norm", "effective_rank", "rank_90", "amplification", "overlap")}
    columns |= {key: [] for key in ("amplification_null", "overlap_null", "intruders", "intruders_null")}
    columns["intruder_energy"] = []
    for key, (weight, delta) in found.items():
        if not delta.any() or ".layer." not in key:  # of the blocks alone
            continue
        s = np.linalg.svd(delta, compute_uv=False)
        p, norm = s[s > 0] / s.sum(), np.linalg.norm(delta)
        u, v = directions(delta, left=True), directions(delta)
        columns["relative_norm"].append(norm / np.linalg.norm(weight))
        columns["effective_rank"].append(np.exp(-(p * np.log(p)).sum()))
        columns["rank_90"].append(np.argmax(np.cumsum(s**2) >= 0.9 * (s**2).sum()) + 1)
        top = np.linalg.norm(s[: v.shape[1]])
        columns["amplification"].append(top / np.linalg.norm(u.T @ weight @ v))
        expected = np.linalg.norm(weight) * v.shape[1] / np.sqrt(weight.size)
        columns["amplification_null"].append(top / expected)
        if other[key][1].any():
            theirs = directions(other[key][1])
            columns["overlap"].append(np.linalg.norm(v.T @ theirs) ** 2 / min(v.shape[1], theirs.shape[1]))
            columns["overlap_null"].append(max(v.shape[1], theirs.shape[1]) / len(v))
        count, energy = count_intruders(weight, delta)
        left, right = random_change(torch.tensor(s), weight.shape, seed=0)
        columns["intruders"].append(count)
        columns["intruder_energy"].append(energy)
        columns["intruders_null"].append(count_intruders(weight, (left @ right).numpy())[0])
    summed = {key: mean if key.startswith("intruder") else median for key in columns}
    return {key: float(summed[key](values)) for key, values in columns.items()} | {
        "changed": len(columns["effective_rank"])
    }


@pytest.mark.parametrize("name", CHANGES)
def test_columns_of_a_change_are_numpys(root, rows, name):
    """Each against full fine-tuning of its own seed; full itself against that of the other."""
    reference = {"full": "full-1", "full-1": "full", "dora": "full-1"}.get(name, "full")
    for column, value in expect(root, name, reference).items():
        assert rows[name][column] == pytest.approx(value, rel=1e-5), column
    assert rows[name]["overlap_with"] == f"full, seed {int(reference == 'full-1')}"


def test_intruders_are_there_to_be_counted(rows):
    assert 0 < rows["dora"]["intruders_null"] < rows["dora"]["intruders"]


def test_without_a_change_there_is_nothing_to_say(rows):
    names = [name for name in change_measures.NOTHING if name != "changed"]
    assert [rows["bitfit"]["changed"], rows["series"]["changed"]] == [0, None]
    assert all(rows[training][name] is None for training in ("bitfit", "series") for name in names)


@pytest.mark.parametrize("name", TRAININGS)
def test_what_it_learned_and_cost_is_the_reports(root, rows, name):
    """Of several rates the best stands for all."""
    place = root / name / ("" if name != "lora" else best_of(root / name))
    report, row = json.loads((place / "train.json").read_text()), rows[name]
    results, kept = report["results"], report["results"]["forgotten"]
    assert row["folder"] == str(place) and row["method"] == report["method"]
    assert (row["trainable"], row["stored"]) == (report["counts"]["trainable"], report["counts"]["stored"])
    assert (row["learned"], row["learned_before"]) == (
        results["learned"]["accuracy"],
        results["learned"]["before"]["accuracy"],
    )
    assert row["forgotten"] == kept["before"] - kept["after"] and row["kept"] == kept["after"]
    assert (row["lr"], row["seed"], row["steps"]) == (report["loop"]["lr"], report["loop"]["seed"], 3)
    assert row["seconds_per_step"] == results["seconds_per_step"] and row["peak_memory"] == results["peak_memory"]


def test_labels_tell_trainings_apart(rows):
    assert [rows[name]["label"] for name in TRAININGS] == [
        *("full", "full", "lora r=2", "lora r=6 dora", "vera", "bitfit", "last_layers", "series")
    ]


def test_labels_leave_out_what_goes_without_saying():
    """Each is a method, its options and its targets; what all of a method share is not said, nor what is usual."""
    given = [
        ("lora", {"rank": 8, "init": "kaiming", "alpha": 1.0}, {"targets": ""}),
        ("lora", {"rank": 2, "init": "pissa", "alpha": 1.0}, {"targets": "mlp"}),
        ("vera", {"rank": 256, "save_projection": False}, {"targets": ""}),
        ("vera", {"rank": 256, "save_projection": True}, {"targets": ""}),
    ]
    loop = {"lr": 1e-3, "steps": 3, "epochs": 1, "batch": 8}
    reports = [
        {"method": method, "method_options": options, "targets": sites, "loop": loop}
        for method, options, sites in given
    ]
    assert make_labels(reports) == ["lora r=8", "lora r=2 init=pissa targets=mlp", "vera save_projection=False", "vera"]


def test_labels_say_what_the_loop_did_where_nothing_else_tells_two_apart():
    fixed = {"method": "lora", "method_options": {"rank": 8}, "targets": {}}
    loops = [{"lr": lr, "steps": steps, "epochs": 1, "batch": 8} for lr, steps in ((1e-5, 3), (1e-2, 15))]
    labels = make_labels([fixed | {"loop": loop} for loop in loops])
    assert labels == ["lora lr=1e-05 steps=3", "lora lr=0.01 steps=15"]


@pytest.mark.parametrize(("name", "value"), [("holdout", 0.4), ("text", "body"), ("names", ["a", "b", "c"])])
def test_trainings_that_are_evaluated_on_other_data_are_refused(root, tmp_path, name, value):
    shutil.copytree(root / "series", tmp_path / "series")
    report = json.loads((tmp_path / "series/train.json").read_text())
    report["data"][name] = value
    (tmp_path / "series/train.json").write_text(json.dumps(report))
    with pytest.raises(RunError, match=f"other data .{name}: "):
        compare([root / "full", tmp_path / "series"], tmp_path / "out")


def test_csv_and_json_hold_the_rows(root, rows):
    expected = list(rows.values())
    assert json.loads((root / "compared/compare.json").read_text()) == expected
    with (root / "compared/compare.csv").open(encoding="utf-8", newline="") as stream:
        found = list(csv.DictReader(stream))
    assert [list(row) for row in found] == [list(row) for row in expected]
    for mine, row in zip(found, expected, strict=True):
        assert mine == {name: "" if value is None else str(value) for name, value in row.items()}


@pytest.fixture
def work(monkeypatch):
    """What is computed: decompositions of ΔW, and pieces that are measured."""
    seen, put, decomposed = [], Pieces.put, analyze.analyze_matrix

    def note(self, key, row, tensors):
        seen.append(key)
        put(self, key, row, tensors)

    def count(task, *given, **more):
        seen.append(task.store_key)
        return decomposed(task, *given, **more)

    monkeypatch.setattr(Pieces, "put", note)
    monkeypatch.setattr(analyze, "analyze_matrix", count)
    return seen


def test_nothing_is_computed_twice(root, folders, rows, work):
    """Not with other trainings beside them either, under which labels change."""
    place = root / "compared"
    assert compare(folders, place, options=CompareOptions(directions=TOP)) == list(rows.values())
    fewer = compare([root / "full", root / "full-1", root / "dora"], place, options=CompareOptions(directions=TOP))
    assert fewer[2] == {**rows["dora"], "label": "lora"}
    assert not work


def test_another_training_in_the_folder_is_computed_anew(root, tmp_path, work):
    for name in ("full", "lora"):
        shutil.copytree(root / name, tmp_path / name)
    for name in ("bert", "data.csv", "other.csv"):
        (tmp_path / name).symlink_to(root / name)
    pair = [tmp_path / "full", tmp_path / "lora"]
    options = CompareOptions(directions=TOP)
    first = compare(pair, tmp_path / "out", options=options)
    work.clear()
    teach(tmp_path, "lora", method_options={"rank": 5}, overwrite=True)
    second = compare(pair, tmp_path / "out", options=options)
    assert work and not any(key.startswith("full") for key in work)
    assert second[0] == first[0] and 2 < second[1]["effective_rank"] <= 5
    assert second[1]["overlap_null"] == TOP / 32
    assert compare(pair, tmp_path / "new", options=options) == second


@pytest.mark.parametrize("stop", [2, 50])
def test_what_was_stopped_goes_on(root, rows, work, monkeypatch, tmp_path, stop):
    """While ΔW are decomposed, or while they are compared."""
    given = [root / "full", root / "full-1"]
    options = CompareOptions(directions=TOP)

    def interrupt(step):
        if len(work) >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(given, tmp_path, options=options, progress=interrupt)
    assert stop <= len(work) < 56
    assert compare(given, tmp_path, options=options) == [rows["full"], rows["full-1"]]
    assert len(work) in (56, 57)  # of 16 matrices ΔW, of the blocks' 12 a piece, twice; one may have been under way


def write_report(folder, **changed):
    """A folder that says it is the full training, but for some fields."""
    shutil.copytree(folder.parent / "full", folder)
    report = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**report, **changed}))
    return folder


def test_what_cannot_be_compared_is_refused_in_a_sentence(root, tmp_path):
    (tmp_path / "full").symlink_to(root / "full")
    stopped = write_report(tmp_path / "stopped", finished=False)
    other = write_report(tmp_path / "other", base={"ref": "elsewhere", "files": {"model.safetensors": "0"}})
    newer = write_report(tmp_path / "newer", method="telepathy")
    hollow = write_report(tmp_path / "hollow")
    shutil.rmtree(hollow / "final")
    rates = write_report(tmp_path / "rates", finished=False, rates=[1e-3])
    (tmp_path / "empty").mkdir()
    full = root / "full"
    for given, kind, said in (
        ([full, stopped], RunError, "stopped' is no finished training"),
        ([hollow], RunError, "hollow' is no finished training"),
        ([rates], RunError, "rates' is no finished training"),
        ([full, other], RunError, "other' was trained from 'elsewhere', the others from"),
        ([full, root / "lora", tmp_path / "full"], OptionError, "full' is given twice"),
        ([root / "lora", root / "lora" / best_of(root / "lora")], OptionError, "is given twice"),
        ([tmp_path / "empty"], RunError, "empty' is no training folder"),
        ([full, tmp_path / "gone"], RunError, "gone' is no training folder"),
        ([full, newer], RunError, "'telepathy', which this deltaspec does not know"),
        ([], OptionError, "no training to compare"),
    ):
        with pytest.raises(kind, match=said) as caught:
            compare(given, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_base_in_the_place_of_the_old_is_noticed(root, tmp_path):
    shutil.copytree(root / "bert", tmp_path / "bert")
    (tmp_path / "data.csv").symlink_to(root / "data.csv")
    run(tmp_path, tmp_path / "out", method="full", loop={"steps": 1})
    assert compare([tmp_path / "out"], tmp_path / "first")[0]["changed"] == 12
    save(build("bert", hidden_size=32, intermediate_size=48, seed=1), tmp_path / "bert")
    with pytest.raises(RunError, match="bert' was changed since"):
        compare([tmp_path / "out"], tmp_path / "second")


def test_without_full_finetuning_or_intruders(root, rows, tmp_path):
    (found,) = compare([root / "dora"], tmp_path, options=CompareOptions(directions=TOP, intruders=False))
    left = {"label", "overlap", "overlap_null", "overlap_with", "intruders", "intruders_null", "intruder_energy"}
    assert found["label"] == "lora" and all(found[name] is None for name in left - {"label"})
    assert {n: v for n, v in found.items() if n not in left} == {n: v for n, v in rows["dora"].items() if n not in left}
