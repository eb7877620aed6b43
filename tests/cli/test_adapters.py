"""The commands around adapters: output, exit codes, and one sentence for every mistake."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deltaspec.cli.main import cli
from tests.workflows.extraction.test_extract import noisy_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [str(path) for path in noisy_pair(tmp_path_factory.mktemp("pair"))]


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def adapter(pair, tmp_path):
    done = run("extract", *pair, "--rank", "4", "-o", tmp_path / "adapter", "--quiet")
    assert done.exit_code == 0, done.output
    return tmp_path / "adapter"


def test_extract_prints_a_certificate_and_verify_agrees(pair, adapter, tmp_path):
    said = run("extract", *pair, "--rank", "4", "-o", tmp_path / "again", "--quiet").stdout
    assert "error" in said
    assert "best" in said
    assert "Kept of ‖Δ‖²" in said
    assert "Not carried: 5 tensors" in said
    assert "model.norm.weight" in said
    done = run("verify", *pair, adapter, "--quiet")
    assert done.exit_code == 0
    assert "As good as deltaspec.json claims." in done.stdout


def test_json_is_one_object_with_every_matrix(pair, tmp_path):
    done = run("extract", *pair, "--energy", "0.5,0.9", "-o", tmp_path / "out", "--json", "--quiet")
    reports = json.loads(done.stdout)
    assert set(reports) == {"energy-0.5", "energy-0.9"}
    assert all(len(report["matrices"]) == 16 for report in reports.values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"energy-0.5", "energy-0.9"}


def test_an_adapter_worse_than_it_claims_ends_with_one(pair, adapter):
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    first = next(name for name in state if "lora_B" in name)
    state[first] *= 0.5
    save_file(state, file)
    done = run("verify", *pair, adapter, "--quiet", "--json")
    assert done.exit_code == 1
    assert len(json.loads(done.stdout)["worse"]) == 1


def test_resize_and_combine_write_adapters(pair, adapter, tmp_path):
    small = run("resize", adapter, "--rank", "2", "-o", tmp_path / "small", "--quiet")
    both = run("combine", f"{adapter}:0.5", tmp_path / "small", "-o", tmp_path / "both", "--quiet")
    assert small.exit_code == both.exit_code == 0, (small.output, both.output)
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 2
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["r"] == 4
    merged = run("merge", pair[0], tmp_path / "both", "-o", tmp_path / "merged", "--quiet")
    assert merged.exit_code == 0, merged.output
    assert run("analyze", pair[0], tmp_path / "merged", "-o", tmp_path / "run", "--quiet").exit_code == 0


MISTAKES = {
    "two policies": (["--rank", "4", "--energy", "0.9"], "--rank and --energy"),
    "no number": (["--rank", "many"], "--rank is 'many'"),
    "rank zero": (["--rank", "0"], "--rank is 0"),
    "half a rank": (["--rank", "1.5"], "--rank is 1.5"),
    "more than all": (["--energy", "1.1"], "--energy is 1.1"),
    "unit": (["--size", "5 parsecs"], "--size is '5 parsecs'"),
    "too small": (["--params", "10"], "buys nothing"),
    "bounds": (["--energy", "0.5", "--min-rank", "9", "--max-rank", "3"], "--min-rank 9"),
    "target": (["--target", "ollama"], "--target is 'ollama'"),
    "extras": (["--target", "vllm", "--extras", "all"], "needs --target peft"),
    "weighted": (["--rank", "4", "--weighted"], "--weighted"),
    "run": (["--rank", "4", "--run", "somewhere"], "--run gives spectra"),
    "no run": (["--params", "5K", "--run", "nowhere"], "nowhere"),
    "moments": (["--calibration", "nowhere.safetensors"], "nowhere.safetensors"),
    "nothing": (["--include", "nothing like this"], "leave nothing"),
    "dtype": (["--dtype", "int4"], "--dtype is 'int4'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_two(mistake, pair, tmp_path):
    arguments, said = MISTAKES[mistake]
    done = run("extract", *pair, "-o", tmp_path / "out", "--quiet", *arguments)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_swapped_and_missing_arguments_say_what_to_do(pair, adapter, tmp_path):
    assert "swap the two arguments" in run("extract", adapter, pair[0], "-o", tmp_path / "x", "--quiet").stderr
    assert "deltaspec combine" in run("extract", adapter, adapter, "-o", tmp_path / "x", "--quiet").stderr
    assert "check the order" in run("verify", pair[0], adapter, pair[1], "--quiet").stderr
    assert "extract one first" in run("resize", pair[0], "--rank", "2", "-o", tmp_path / "x", "--quiet").stderr
    assert run("extract", tmp_path / "none", pair[1], "-o", tmp_path / "x", "--quiet").exit_code == 2
    shutil.rmtree(adapter)
    assert run("verify", *pair, adapter, "--quiet").exit_code == 2


def test_the_default_folder_is_named_after_model_and_policy(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("extract", *pair, "--quiet").exit_code == 0
    assert (tmp_path / "adapters" / "tuned-rank-16" / "adapter_model.safetensors").exists()


def test_a_pair_in_the_wrong_order_is_worse_than_no_adapter(pair, adapter):
    done = run("verify", pair[1], pair[0], adapter, "--quiet")
    assert done.exit_code == 1
    assert "in this order?" in done.stdout
