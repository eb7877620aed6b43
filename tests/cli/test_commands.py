"""Every command as a person would type it: output, exit codes, and what a mistake is answered with."""

from __future__ import annotations

import csv
import io
import json
import re
import resource
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import deltaspec
from deltaspec.cli.help import help as help_command
from deltaspec.cli.main import COMMANDS, cli
from deltaspec.options import AnalyzeOptions, PairOptions
from deltaspec.spectra.metrics import METRICS
from tests.families import FAMILIES, random_state, write

ROOT = Path(__file__).resolve().parents[2]
LLAMA = FAMILIES["llama"]


def call(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def models(tmp_path):
    base = random_state(LLAMA)
    tuned = {n: t + 0.01 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in base.items()}
    return [write(tmp_path / side, state, LLAMA.config) for side, state in (("base", base), ("tuned", tuned))]


@pytest.fixture
def run(models, tmp_path):
    assert call("analyze", *models, "-o", tmp_path / "run", "--quiet").exit_code == 0
    return tmp_path / "run"


def test_analyze_prints_a_line_per_role_and_per_depth(models, tmp_path):
    result = call("analyze", *models, "-o", tmp_path / "run")
    assert result.exit_code == 0
    for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed"):
        assert re.search(rf"^{role} +\d+ ", result.output, re.MULTILINE)
    assert re.search(r"^depth +matrices", result.output, re.MULTILINE)
    assert re.search(r"^norm +\d+ ", result.output, re.MULTILINE)
    assert "rounding" in result.output
    assert str(tmp_path / "run") in result.output


def test_json_is_one_object_with_everything(models, tmp_path):
    result = call("analyze", *models, "-o", tmp_path / "run", "--json", "--quiet")
    found = json.loads(result.stdout)
    assert set(found["records"][0]) >= {"tensor", "role", "d_out", *METRICS}
    assert found["failures"] == {}
    assert found["vectors"]


def test_a_dry_run_lists_and_writes_nothing(models, tmp_path):
    result = call("analyze", *models, "-o", tmp_path / "run", "--dry-run")
    assert result.exit_code == 0
    assert "model.layers.0.self_attn.q_proj.weight" in result.output
    assert not (tmp_path / "run").exists()
    assert json.loads(call("analyze", *models, "--dry-run", "--json").stdout)["pairs"]


@pytest.mark.parametrize("by", ["role", "depth", "matrix"])
def test_show(run, by):
    result = call("show", run, "--by", by)
    assert result.exit_code == 0
    assert {"role": "q_proj", "depth": "depth", "matrix": "model.layers.0.self_attn.q_proj.weight"}[by] in result.output


def test_exports_hold_the_same_rows(run, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    rows = json.loads(call("export", run, "--format", "json").stdout)
    assert isinstance(rows, list)
    lines = list(csv.DictReader(io.StringIO(call("export", run).stdout)))
    assert [line["tensor"] for line in lines] == [row["tensor"] for row in rows]
    assert float(lines[0]["effective_rank"]) == rows[0]["effective_rank"]
    assert call("export", run, "--format", "parquet", "-o", tmp_path / "x.parquet").exit_code == 0
    assert pyarrow.read_table(tmp_path / "x.parquet").to_pylist() == rows
    wanted = ["tensor", "part", "role", "depth", "expert", "d_out", "d_in", "base_dtype", "tuned_dtype", "spectrum_of"]
    assert set(wanted) | set(METRICS) <= set(rows[0])


def test_spectra_of_both_sides(models, tmp_path):
    result = call(
        "analyze", *models, "-o", tmp_path / "run", "--spectra", "base,tuned,delta", "--vectors", "2", "--quiet"
    )
    assert result.exit_code == 0
    rows = json.loads(call("export", tmp_path / "run", "--format", "json").stdout)
    assert {row["spectrum_of"] for row in rows} == {"base", "tuned", "delta"}
    base = next(row for row in rows if row["spectrum_of"] == "base")
    delta = next(row for row in rows if row["spectrum_of"] == "delta" and row["tensor"] == base["tensor"])
    assert base["frobenius_norm"] == pytest.approx(delta["base_norm"], rel=1e-12)
    assert "base " in result.output


def test_a_failed_matrix_exits_1_and_the_others_are_there(models, tmp_path):
    base = random_state(LLAMA)
    bad = "model.layers.0.self_attn.q_proj.weight"
    base[bad][3, 1] = float("nan")
    norm = next(n for n in base if "norm" in n)
    base[norm][0] = float("inf")
    write(tmp_path / "bad", base, LLAMA.config)
    result = call("analyze", tmp_path / "bad", models[1], "-o", tmp_path / "run", "--quiet")
    assert result.exit_code == 1
    assert f"base tensor '{bad}'" in result.output
    assert "index (3, 1)" in result.output
    assert f"'{norm}'" in result.output
    assert "v_proj" in result.output
    assert call("show", tmp_path / "run").exit_code == 1


MISTAKES = {
    "missing": (["analyze", "nowhere/at/all", "{tuned}"], "nowhere/at/all"),
    "option": (["analyze", "{base}", "{tuned}", "--device", "tpu"], "--device"),
    "spectra": (["analyze", "{base}", "{tuned}", "--spectra", "delta,gamma"], "--spectra"),
    "regex": (["analyze", "{base}", "{tuned}", "--include", "("], "--include"),
    "vocab": (["analyze", "{base}", "{tuned}", "--vocab", "all"], "--vocab"),
    "vectors": (["analyze", "{base}", "{tuned}", "--vectors", "-1"], "--vectors"),
    "one": (["analyze", "{base}"], "TUNED"),
    "run": (["show", "{base}"], "manifest.json"),
    "command": (["analyse", "{base}"], "analyse"),
    "other run": (["analyze", "{base}", "{base}", "-o", "{run}"], "tuned.files"),
    "no run": (["analyze", "{base}", "{tuned}", "-o", "{base}"], "not a run directory"),
    "plot": (["plot", "{base}"], "manifest.json"),
    "export": (["export", "{run}", "-o", "{base}/model.safetensors/x"], "cannot be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_2(mistake, models, run):
    words, said = MISTAKES[mistake]
    places = {"base": models[0], "tuned": models[1], "run": run}
    result = call(*(word.format(**places) for word in words))
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_an_unreadable_file_is_named(models, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes((models[0] / "model.safetensors").read_bytes()[:5000])
    result = call("analyze", models[0], tmp_path / "cut.safetensors")
    assert result.exit_code == 2
    assert "cut.safetensors" in result.output


def test_a_read_only_folder_is_said_to_be(models):
    """/proc refuses new folders to everyone, root included."""
    result = call("analyze", *models, "-o", "/proc/deltaspec/run")
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_a_file_in_the_way_of_the_run_is_named(models, tmp_path):
    (tmp_path / "file").write_text("")
    result = call("analyze", *models, "-o", tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_a_full_disk_behind_stdout_is_one_sentence(run):
    code = "from deltaspec.cli.main import main; main()"
    with open("/dev/full", "wb") as full:  # noqa: PTH123 (a device)
        done = subprocess.run(
            [sys.executable, "-c", code, "show", str(run)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"Error: cannot write the output")


def test_showing_a_run_loads_no_torch(run):
    code = (
        "import sys; from deltaspec.cli.main import cli\n"
        "try: cli(['show', sys.argv[1]])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], check=True, capture_output=True, text=True)
    assert "q_proj" in done.stdout


def test_unrelated_models_and_equal_ones_are_remarked_on(models, tmp_path):
    other = write(tmp_path / "other", random_state(LLAMA, seed=9), LLAMA.config)
    assert "larger than the weights" in call("analyze", models[0], other, "-o", tmp_path / "r", "--quiet").output
    assert "no matrix differs" in call("analyze", models[0], models[0], "-o", tmp_path / "s", "--quiet").output


def test_a_coarser_base_is_remarked_on(models, tmp_path):
    base = write(tmp_path / "coarse", random_state(LLAMA, dtype=torch.bfloat16), LLAMA.config)
    assert "BF16 in the base and F32" in call("analyze", base, models[1], "-o", tmp_path / "r", "--quiet").output


def test_only_vectors_is_a_run_too(tmp_path):
    for side, value in (("a", 1.0), ("b", 1.5)):
        save_file({"model.norm.weight": torch.full((4,), value)}, tmp_path / f"{side}.safetensors")
    result = call("analyze", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-o", tmp_path / "r", "--quiet")
    assert result.exit_code == 0
    assert re.search(r"^norm +1 +0 +0\.5$", result.output, re.MULTILINE)
    assert "eff. rank" not in result.output


def test_stored_adapters_of_a_zero_delta(models, tmp_path):
    """Base against itself: zero everywhere, and not rank 1."""
    result = call("analyze", models[0], models[0], "-o", tmp_path / "run", "--json", "--quiet")
    for record in json.loads(result.stdout)["records"]:
        assert (record["effective_rank"], record["rank_90"], record["relative_norm"]) == (0, 0, 0)


def test_help_loads_no_torch_and_is_quick():
    """Start-up is at most 0.3 s of CPU; the best of three, for a busy machine slows the others."""
    code = (
        "import sys; from deltaspec.cli.main import cli\n"
        "for words in (['--help'], ['help', 'numbers']):\n"
        "    try: cli(words)\n    except SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.strip().endswith("False False")
    assert all(name in done.stdout for name in COMMANDS)
    assert best < 0.3


EXTRAS = ("pandas", "pyarrow", "transformers", "tokenizers", "accelerate", "datasets", "peft", "scipy")


def test_what_runs_no_model_needs_no_extra(models, tmp_path):
    """In a process where nothing of an extra can be imported; it would fail at the import."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split()))\n"
        "from click.testing import CliRunner; from deltaspec.cli.main import cli\n"
        "for line in sys.argv[2:]:\n"
        "    done = CliRunner().invoke(cli, line.split())\n"
        "    assert done.exit_code == 0, (line, done.output, done.exception)\n"
    )
    base, tuned = models
    lines = (
        f"analyze {base} {tuned} -o run --quiet",
        "show run",
        "export run --format json -o run.json",
        "plot run --format png -o figures",
        f"extract {base} {tuned} --rank 2 -o small --quiet",
        f"extract {base} {tuned} --params 2K -o budget --quiet",
        f"verify {base} {tuned} small --quiet",
        "combine small budget -o both --quiet",
        "resize both --rank 2 -o resized --quiet",
        f"merge {base} resized -o merged --quiet",
        "help glossary",
    )
    command = [sys.executable, "-c", code, " ".join(EXTRAS), *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_every_command_names_its_page_of_the_manual():
    for name in COMMANDS:
        said = call(name, "--help").output
        page = re.search(r"^Manual: deltaspec help (\S+)$", said.replace("\n  ", "\n").strip(), re.MULTILINE)
        assert name == "help" or (page and call("help", page[1]).exit_code == 0), said


def test_help_shows_a_page_and_lists_them():
    listed = call("help").output
    for topic in (
        "numbers",
        "adapters",
        "training",
        "formats",
        "servers",
        "cost",
        "errors",
        "architecture",
        "glossary",
    ):
        assert re.search(rf"^{topic} +\S", listed, re.MULTILINE)
        page = files("deltaspec") / "manual" / f"{topic}.md"
        assert call("help", topic).output == page.read_text(encoding="utf-8")


def test_help_on_a_terminal_goes_through_the_pager(monkeypatch):
    shown = []
    monkeypatch.setattr("deltaspec.cli.help.sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("click.echo_via_pager", shown.append)
    help_command.callback("glossary")
    assert shown[0].startswith("# Glossary")


def test_an_unknown_topic_is_one_sentence_with_the_list():
    result = call("help", "nothing")
    assert result.exit_code == 2
    assert "no page 'nothing'" in result.stderr and "numbers" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [("number", "did you mean 'numbers'?"), ("analyze", "'analyze' is a command, see deltaspec analyze --help")],
)
def test_an_unknown_topic_names_what_is_near(asked, said):
    result = CliRunner().invoke(cli, ["help", asked])
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("asked", ["NUMBERS", "numbers"])
def test_a_topic_is_found_in_any_case(asked):
    assert CliRunner().invoke(cli, ["help", asked]).stdout.startswith("# ")


def test_generated_pages_have_a_short_name():
    assert "METRICS" in CliRunner().invoke(cli, ["help", "metrics"]).stdout.splitlines()[0]


def test_the_package_says_its_version():
    assert deltaspec.__version__ == version("deltaspec")


def test_one_version_everywhere():
    """Project, newest release of the changelog, and citation; the command says that of what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    releases = re.findall(
        r"^## (\d[\d.]*) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert releases[0][0] == project
    assert f"\nversion: {project}\n" in citation and f'\ndate-released: "{releases[0][1]}"\n' in citation
    assert call("--version").output.strip() == f"cli, version {version('deltaspec')}"


def test_the_command_line_takes_its_defaults_from_the_options():
    parameters = cli.get_command(None, "analyze").make_context("analyze", ["base", "tuned"]).params
    for field in (*fields(AnalyzeOptions), *fields(PairOptions)):
        if field.name == "pairing":
            continue
        default = ",".join(field.default) if field.name == "spectra" else field.default
        assert parameters[field.name] == default


def test_a_hostile_name_prints_no_control_characters(tmp_path):
    """Terminal escapes in a tensor's name reach neither terminal nor file system."""
    name = "evil\x1b[2J.weight\nq_proj  999"
    for side, seed in (("a", 0), ("b", 1)):
        save_file(
            {name: torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))}, tmp_path / f"{side}.safetensors"
        )
    call("analyze", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-o", tmp_path / "run", "--quiet")
    result = call("show", tmp_path / "run", "--by", "matrix")
    assert result.exit_code == 0
    assert r"evil\x1b[2J.weight\nq_proj  999" in result.output
    listed = call("analyze", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--dry-run").output
    assert r"evil\x1b[2J.weight\nq_proj  999" in listed
