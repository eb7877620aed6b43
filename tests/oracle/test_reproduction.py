"""scripts/reproduce_learning_forgetting.py --quick, the whole way on a tiny model: what it writes, and going on."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.tiny_models import WORDS, build, save

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce_learning_forgetting.py"
METHODS = {
    "full": "full",
    "last layers": "last_layers",
    "BitFit": "bitfit",
    **{f"LoRA r={rank}": "lora" for rank in (1, 4, 16, 64)},
    "VB-LoRA": "vblora",
    "VeRA": "vera",
    "series": "series",
    "parallel": "parallel",
}
SIDES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}  # VB-LoRA's vectors of 128 fit


def write_data(folder):
    """Sentences whose words tell their class, as the two files have them."""
    generator = random.Random(0)

    def sentence(kind, kinds):
        return " ".join(generator.choice(WORDS[kind::kinds]) for _ in range(generator.randint(4, 9)))

    rows = [f"{n}\t{(-1.5, 2.5)[n % 2]}\t{sentence(n % 2, 2)}" for n in range(120)]
    (folder / "vader_movie_snippets.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    rows = [f"{sentence(n % 5, 5)},intent {n % 5}" for n in range(200)]
    (folder / "banking77_test.csv").write_text("\n".join(["text,category", *rows]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    place = tmp_path_factory.mktemp("case")
    save(build("bert", **SIDES), place / "model")
    (place / "data").mkdir()
    given = ["--quick", "--model", place / "model", "--data", write_data(place / "data"), "--work", place / "work"]
    paths = filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}

    def run():
        command = [sys.executable, str(SCRIPT), *map(str, [*given, "--out", place / "out"])]
        done = subprocess.run(command, env=env, cwd=place, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, place

    return run


@pytest.fixture(scope="module")
def first(call):
    return call()


def read_rows(place):
    with (place / "out/learning_forgetting.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_for_each_method(first):
    said, place = first
    rows = read_rows(place)
    assert {row["label"]: row["method"] for row in rows} == METHODS and len(rows) == len(METHODS)
    for row in rows:
        report = json.loads((place / "work-quick" / row["folder"] / "train.json").read_text())
        results = report["results"]
        assert (
            int(row["trainable"]) == report["counts"]["trainable"] and int(row["stored"]) == report["counts"]["stored"]
        )
        assert float(row["learned"]) == results["learned"]["accuracy"]
        assert float(row["forgotten"]) == results["forgotten"]["before"] - results["forgotten"]["after"]
        assert float(row["seconds_per_step"]) > 0 and float(row["peak_memory"]) > 2**20
        assert any(line.startswith(f"{row['label']} ") for line in said.splitlines())
    plain = {row["label"] for row in rows if not row["effective_rank"]}
    assert plain == {"last layers", "BitFit", "series", "parallel"}  # --quick looks at the first block alone
    assert {row["overlap_with"] for row in rows if row["overlap"]} == {"full, seed 0"}


def test_ranks_are_those_of_the_factors(first):
    """LoRA's effective rank, from its files, in float64."""
    _, place = first
    found = {row["label"]: float(row["effective_rank"]) for row in read_rows(place) if row["method"] == "lora"}
    for label, value in found.items():
        name = label.replace(" ", "-").replace("=", "")
        stored = load_file(place / f"work-quick/{name}/seed-0/final/adapter_model.safetensors")
        ranks = []
        for key, up in stored.items():
            if ".layer.0." in key and key.endswith("lora_B.weight"):
                down = stored[key.replace("lora_B", "lora_A")]
                p = np.linalg.svd(up.double().numpy() @ down.double().numpy(), compute_uv=False)
                p = p[p > 1e-12 * p[0]] / p.sum()
                ranks.append(np.exp(-(p * np.log(p)).sum()))
        assert len(ranks) == 6 and value == pytest.approx(np.median(ranks), rel=1e-6)


def test_figures_are_there_and_a_second_call_goes_on(first, call):
    """Of what is finished nothing is done again; a training that is gone is done again, to the same numbers."""
    said, place = first
    figures = ("learning", "change", "rank_by_step_full", "rank_by_step_lora-r16")
    for name in figures:
        for kind, magic in (("pdf", b"%PDF"), ("png", b"\x89PNG")):
            assert (place / f"out/{name}.{kind}").read_bytes().startswith(magic)
    files = {path: path.stat().st_mtime_ns for path in (place / "work-quick").rglob("*.safetensors")}
    assert len(files) > 100
    lost = place / "work-quick/VeRA/seed-0/final/adapter_model.safetensors"
    before, kept = read_rows(place), lost.read_bytes()
    for path in sorted(lost.parents[1].rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    again, _ = call()
    assert lost.read_bytes() == kept
    changed = {path for path, time in files.items() if path.stat().st_mtime_ns != time}
    assert changed == {lost}
    for old, new in zip(before, read_rows(place), strict=True):
        for name in old.keys() - {"seconds_per_step", "peak_memory"}:
            assert new[name] == old[name] or float(new[name]) == pytest.approx(float(old[name]), rel=1e-12), name
    assert again.splitlines()[: len(METHODS)] == said.splitlines()[: len(METHODS)]
