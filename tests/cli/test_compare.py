"""``deltaspec compare`` as a person would type it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from deltaspec.cli.compare import compare as command
from deltaspec.cli.compare_table import HEADS
from deltaspec.cli.main import cli
from deltaspec.options import CompareOptions
from deltaspec.workflows.comparison import compare as workflow
from tests.workflows.training.train_case import run, write_case

NAMES = ("full", "r2", "r4", "again", "series")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Trainings of a language model, two of them alike but for their seed."""
    place = write_case(tmp_path_factory.mktemp("case"), "llama")
    given = {
        "full": {"method": "full"},
        "r2": {"method_options": {"rank": 2}},
        "r4": {"method_options": {"rank": 4}},
        "again": {"method_options": {"rank": 4}, "loop": {"seed": 1}},
        "series": {"method": "series"},
    }
    for name in NAMES:
        loop = {"steps": 3, **given[name].pop("loop", {})}
        run(place, place / name, "llama", forget=place / "text.txt", loop=loop, **given[name])
    return place


@pytest.fixture(scope="module")
def call(root):
    def invoke(*given, names=NAMES):
        folders = [root / name for name in names]
        return CliRunner().invoke(cli, [str(a) for a in ("compare", *folders, "--quiet", *given)])

    return invoke


def test_flags_are_the_options_with_their_defaults():
    flags = command.make_context("compare", ["out"]).params
    defaults = asdict(CompareOptions())
    assert {name: flags[name] for name in defaults} == defaults


def test_a_table_and_the_figures(call, root, tmp_path):
    done = call("-o", tmp_path / "out", "--format", "png")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out/compare.json").read_text())
    lines = done.stdout.splitlines()
    heads = lines[0].split()
    assert heads[:3] == ["method", "lr", "seed"] and len(lines[0].split("  ")) >= len(HEADS)
    assert [line.split("  ")[0] for line in lines[1:6]] == ["full", "lora r=2", "lora r=4", "lora r=4", "series"]
    for line, row in zip(lines[1:6], rows, strict=True):
        assert f" {row['trainable']:,} " in line and f" {row['learned']:.2f} " in line
        assert f" {row['forgotten']:.4f} " in line or f" {row['forgotten']:.2f} " in line
    assert lines[5].split()[-7:] == ["-"] * 7
    legend = done.stdout.split("\n\n")[1]
    assert "perplexity on held-out data" in legend and "perplexity gained" in legend
    assert "perplexity gained on other data" in legend
    listed = [line.removeprefix("Figure: ") for line in lines if line.startswith("Figure: ")]
    written = [tmp_path / f"out/{name}.{kind}" for name in ("learning", "change") for kind in ("png", "csv")]
    assert listed == [str(path) for path in written] and all(path.stat().st_size for path in written)
    assert done.stderr == ""


def test_of_perplexities_less_is_more(call, root, tmp_path):
    """What is drawn is their negative; what was forgotten is what they gained."""
    done = call("-o", tmp_path / "out", "--json", "--format", "svg")
    rows = json.loads(done.stdout)
    assert rows == json.loads((tmp_path / "out/compare.json").read_text())
    with (tmp_path / "out/learning.csv").open(encoding="utf-8", newline="") as stream:
        drawn = list(csv.DictReader(stream))
    for row, line in zip(rows, drawn, strict=True):
        assert row["metric"] == row["kept_metric"] == "perplexity"
        assert row["learned"] < row["learned_before"] and row["kept"] < row["kept_before"]
        assert row["forgotten"] == row["kept"] - row["kept_before"] < 0
        for name in ("learned", "kept", "kept_before"):
            assert float(line[name]) == pytest.approx(-row[name], rel=1e-9)


def test_mistakes_are_one_sentence_and_exit_code_2(call, root, tmp_path, monkeypatch):
    def refuse(*_args, **_given):
        pytest.fail("something was computed")

    monkeypatch.setattr(workflow, "measure_changes", refuse)
    stopped = shutil.copytree(root / "r2", tmp_path / "stopped")
    report = json.loads((stopped / "train.json").read_text())
    (stopped / "train.json").write_text(json.dumps({**report, "finished": False}))
    for given, said in (
        ([stopped], "is no finished training"),
        ([root / "full"], "is given twice"),
        ([root / "llama"], "is no training folder"),
        (["--directions", "0"], "--directions is 0"),
        (["--include", "("], "--include"),
        (["--style", "nature"], "--style is 'nature'"),
        (["--format", "gif"], "--format is 'gif'"),
        (["--device", "tpu"], "--device is 'tpu'"),
    ):
        done = call("-o", tmp_path / "out", *given)
        assert done.exit_code == 2 and said in done.stderr, done.output
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_loads_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from deltaspec.cli.compare import compare; "
        "result = CliRunner().invoke(compare, ['--help']); assert '--directions' in result.output; "
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
