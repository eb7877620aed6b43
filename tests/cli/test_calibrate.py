"""``deltaspec calibrate`` as a person would type it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from deltaspec.cli.calibrate import calibrate
from deltaspec.cli.main import cli
from deltaspec.io.moments import open_moments
from deltaspec.options import CalibrateOptions, TextOptions
from tests.tiny_models import build, save, write_text


def call(*arguments):
    return CliRunner().invoke(cli, ["calibrate", *(str(argument) for argument in arguments)])


@pytest.fixture
def inputs(tmp_path):
    return save(build("tied"), tmp_path / "model"), write_text(tmp_path / "text.txt"), tmp_path / "m.safetensors"


def test_it_says_what_it_wrote(inputs):
    model, text, out = inputs
    result = call(model, "--text", text, "-o", out, "--length", 8)
    assert result.exit_code == 0, result.output
    about = open_moments(out).about
    assert f"14 layers over {about['tokens']} tokens; 6 share another's moments." in result.stdout
    assert (
        "Left out: 1 (an embedding: its inputs are token ids), for example model.embed_tokens.weight" in result.stdout
    )
    assert str(out) in result.stdout


def test_options_reach_the_file_and_json_is_one_object(inputs):
    model, text, out = inputs
    flags = ("--length", 8, "--tokens", 20, "--batch", 2, "--device", "cpu", "--dtype", "bf16", "--include", "mlp")
    found = json.loads(call(model, "--text", text, "-o", out, *flags, "--json", "--quiet").stdout)
    want = CalibrateOptions(TextOptions(tokens=20, length=8, batch=2, device="cpu"), include="mlp", dtype="bf16")
    assert found["options"] == want.identity() == open_moments(out).about["options"]
    assert found["tokens"] == 20


def test_defaults_are_those_of_the_options():
    defaults = {p.name: p.default for p in calibrate.params}
    options = asdict(CalibrateOptions())
    assert {**options.pop("text"), **options}.items() <= defaults.items()


def test_a_mistake_is_one_sentence(inputs):
    model, text, out = inputs
    for flags, said in (
        (("--length", 1), "--length is 1"),
        (("--include", "nothing"), "Nothing to calibrate"),
        (("--device", "tpu"), "--device is 'tpu'"),
    ):
        result = call(model, "--text", text, "-o", out, "--quiet", *flags)
        assert result.exit_code == 2
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    out.write_text("mine")
    result = call(model, "--text", text, "-o", out, "--quiet")
    assert (result.exit_code, out.read_text()) == (2, "mine")


def test_progress_counts_tokens(inputs, monkeypatch):
    model, text, out = inputs
    monkeypatch.setattr("deltaspec.cli.progress.HEARTBEAT", 0.001)
    result = call(model, "--text", text, "-o", out, "--length", 8, "--batch", 1, "--memory", 1)
    assert "tokens read" in result.stderr
