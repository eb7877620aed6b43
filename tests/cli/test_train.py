"""``deltaspec train`` as a person would type it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from click.testing import CliRunner

from deltaspec.cli.main import cli
from deltaspec.cli.train import train
from deltaspec.cli.train_flags import KINDS
from deltaspec.cli.train_report import Ticks
from deltaspec.training.loop.steps import Tick
from tests.workflows.training.train_case import write_case


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("case"), "bert")


@pytest.fixture
def call(root, monkeypatch):
    monkeypatch.setattr("deltaspec.cli.main.COMMANDS", {"train": "Train."})
    data = ["--data", root / "data.csv", "--holdout", 0.25, "--device", "cpu", "--steps", 4, "--batch", 4]
    return lambda *given: CliRunner().invoke(cli, [str(a) for a in ("train", root / "bert", *data, *given)])


def test_flags_are_the_options_with_their_defaults():
    flags = train.make_context("train", ["model", "--data", "data", "-o", "out"]).params
    for kind in KINDS:
        for field in fields(kind):
            given = flags[field.name]
            assert (float(given) if field.name == "lr" else given) == field.default


def test_a_training_says_what_came_of_it(call, root, tmp_path):
    done = call("-o", tmp_path / "out", "--forget", root / "other.csv", "--lr", 0.01, "--quiet")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/train.json").read_text())
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"lora: {report['counts']['trainable']:,} of ") and "34 more in the head" in lines[0]
    learned, lost = report["results"]["learned"], report["results"]["forgotten"]
    assert f"accuracy {learned['before']['accuracy']:.4g} before, {learned['accuracy']:.4g} after" in lines[1]
    assert lines[2] == f"Other data: accuracy {lost['before']:.4g} before, {lost['after']:.4g} after"
    assert lines[3].startswith("4 steps, ") and lines[3].endswith("MiB at most")
    assert done.stderr == ""
    again = call("-o", tmp_path / "out", "--forget", root / "other.csv", "--lr", 0.01, "--json")
    assert json.loads(again.stdout) == report


def test_several_rates(call, tmp_path):
    done = call("-o", tmp_path / "out", "--lr", "1e-4,1e-2,1e30", "--method", "full", "--quiet")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines[:3]] == ["0.0001", "0.01", "1e+30"]
    assert sum("(best)" in line for line in lines) == 1 and "(best)" not in lines[2]
    assert "stopped at step" in lines[2]


def test_exit_codes(call, tmp_path):
    """2 for mistakes, 1 for a training that failed, one sentence each."""
    for given, code, said in (
        (["--lr", "fast"], 2, "--lr is 'fast'"),
        (["--schedule", "step"], 2, "--schedule is 'step'"),
        (["--rank", "99"], 2, "--rank is 99"),
        (["--method", "full", "--lr", "1e30"], 1, "Training stopped at step"),
    ):
        done = call("-o", tmp_path / f"out{code}", *given, "--quiet")
        assert done.exit_code == code and said in done.stderr, done.output
        assert len(done.stderr.splitlines()) == 1


def test_progress_tells_loss_rate_and_time_left(monkeypatch):
    now = iter([100.0, 100.0, 110.0, 110.0, 120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Ticks(quiet=True)
    assert progress.line() == "reading data and model"
    for step in (41, 61):  # the first one that is seen says nothing about speed
        progress(Tick(step, 100, 1.0, 0.123456, 2e-4, 1.0, 0.5))
    assert progress.line() == "step 61/100, loss 0.1235, lr 0.0002, 2.00 steps/s, 0:19 left"


def test_help_loads_no_torch():
    code = (
        "import sys; from click.testing import CliRunner; from deltaspec.cli.train import train; "
        "result = CliRunner().invoke(train, ['--help']); assert '--accumulate' in result.output; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("flags", [["--lr", "1e38"], ["--lr", "1e-3,1e38"], ["--forget-label", "intent"]])
def test_options_that_cannot_mean_anything_are_refused(flags, tmp_path):
    words = ["train", "nowhere", "--data", "none.csv", "-o", str(tmp_path / "out"), *flags]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert flags[0].removesuffix("-label") in result.output
    assert "Traceback" not in result.output


def test_the_command_runs_as_a_module():
    """As accelerate launch -m starts it."""
    done = subprocess.run([sys.executable, "-m", "deltaspec.cli.main", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "version" in done.stdout
