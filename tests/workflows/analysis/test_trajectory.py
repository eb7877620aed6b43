"""Checkpoints of one training, step by step: order, resumption, what fails, and what is printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deltaspec.cli.main import cli
from deltaspec.errors import CheckpointError, OptionError, PairingError, RunError
from deltaspec.options import AnalyzeOptions
from deltaspec.options.recipe import DataSources, Recipe
from deltaspec.options.training import DataOptions, LoopOptions, RunOptions
from deltaspec.store.training_folder import read_report
from deltaspec.store.trajectory import Trajectory
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.attachment import freeze
from deltaspec.training.sites.model_sites import list_sites
from deltaspec.workflows.analysis import analyze as analysis
from deltaspec.workflows.analysis import attached_matrix, stored_matrix
from deltaspec.workflows.analysis.analyze import analyze
from deltaspec.workflows.analysis.training_steps import find_checkpoints
from deltaspec.workflows.analysis.trajectory import trajectory
from deltaspec.workflows.analysis.write_figures import plot
from deltaspec.workflows.training.saved_adapters import save_adapter
from deltaspec.workflows.training.train import train
from tests import tiny_models
from tests.families import FAMILIES, random_state, write

LLAMA = FAMILIES["llama"]
CPU = AnalyzeOptions(device="cpu", workers=1)


def call(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.fixture
def training(tmp_path):
    """A base, and a folder of three checkpoints that move away from it along one random direction."""
    base = random_state(LLAMA)
    generator = torch.Generator().manual_seed(1)
    change = {name: 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    write(tmp_path / "base", base, LLAMA.config)
    for step in (1000, 20, 300):
        tuned = {name: tensor + step / 1000 * change[name] for name, tensor in base.items()}
        write(tmp_path / "out" / f"checkpoint-{step}", tuned, LLAMA.config)
    return tmp_path / "base", tmp_path / "out"


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.glob("step-*/matrices/*/*.safetensors")}


def test_each_step_is_the_run_of_its_pair(training, tmp_path):
    base, out = training
    found = trajectory(base, [out], tmp_path / "t", options=CPU)
    assert found.steps == [20, 300, 1000]
    assert [run.path.name for run in found.runs] == ["step-00000020", "step-00000300", "step-00001000"]
    for step, run in zip(found.steps, found.runs, strict=True):
        alone = analyze(base, out / f"checkpoint-{step}", tmp_path / f"alone-{step}", options=CPU)
        assert [r.metrics for r in run.records] == [r.metrics for r in alone.records]
        assert run.vectors == alone.vectors
    rows = found.to_dicts()
    assert len(rows) == sum(len(run.records) for run in found.runs)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    norms = {row["step"]: row["relative_norm"] for row in rows if row["tensor"] == found.runs[0].records[0].key.tensor}
    assert norms[1000] == pytest.approx(50 * norms[20], rel=1e-2)
    assert Trajectory.load(tmp_path / "t").to_dicts() == rows


def test_a_run_again_keeps_what_is_there_and_adds_what_is_new(training, tmp_path):
    base, out = training
    trajectory(base, [out / "checkpoint-300"], tmp_path / "t", options=CPU)
    kept = files(tmp_path / "t")
    assert kept
    assert trajectory(base, [out], tmp_path / "t", options=CPU).steps == [20, 300, 1000]
    assert kept.items() <= files(tmp_path / "t").items()
    shutil.rmtree(tmp_path / "t" / "step-00001000" / "matrices" / "0")  # as a kill leaves it
    before = files(tmp_path / "t")
    assert call("show", tmp_path / "t").output.count("Unfinished: step 1000 lacks") == 1
    assert not Trajectory.load(tmp_path / "t").complete
    assert trajectory(base, [out], tmp_path / "t", options=CPU).complete
    assert before.items() <= files(tmp_path / "t").items()
    with pytest.raises(RunError, match="something else"):
        trajectory(base, [out], tmp_path / "t", options=AnalyzeOptions(device="cpu", exact=True))
    with pytest.raises(RunError, match="no trajectory"):
        trajectory(base, [out], out, options=CPU)


def test_a_truncated_checkpoint_is_named_and_the_others_stand(training, tmp_path):
    base, out = training
    file = out / "checkpoint-300" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    result = call("analyze", base, out, "-o", tmp_path / "t", "--quiet")
    assert result.exit_code == 1
    assert "Failed: step 300: " in result.output
    assert "Failed: 1 of the checkpoints or tensors; " in result.output
    assert str(file) in result.output
    found = Trajectory.load(tmp_path / "t")
    assert found.steps == [20, 1000]
    assert set(found.failures) == {300}
    assert call("show", tmp_path / "t").exit_code == 1
    file.write_bytes(whole)
    assert call("analyze", base, out, "-o", tmp_path / "t", "--quiet").exit_code == 0
    assert Trajectory.load(tmp_path / "t").failures == {}
    for checkpoint in out.iterdir():
        (checkpoint / "model.safetensors").write_bytes(whole[:99])
    result = call("analyze", base, out, "-o", tmp_path / "none", "--quiet")
    assert result.exit_code == 2


def test_base_spectra_are_computed_once(training, tmp_path, monkeypatch):
    base, out = training
    asked = []
    original = analysis.analyze_matrix

    def watched(task, *rest, **named):
        asked.append(task.spectrum_of)
        return original(task, *rest, **named)

    monkeypatch.setattr(analysis, "analyze_matrix", watched)
    options = AnalyzeOptions(device="cpu", spectra=("delta", "base"))
    found = trajectory(base, [out], tmp_path / "t", options=options)
    assert asked.count("delta") == 3 * asked.count("base")
    values = [[r.metrics["effective_rank"] for r in run.records if r.spectrum_of == "base"] for run in found.runs]
    assert values[0] == values[1] == values[2] != []


def test_the_table_json_export_and_figures(training, tmp_path):
    base, out = training
    result = call("analyze", base, out, "-o", tmp_path / "t")
    assert result.exit_code == 0
    heads = result.stdout.splitlines()[0].split("  ")
    assert [h.strip() for h in heads if h][:3] == ["step", "role", "matrices"]
    lines = [line.split() for line in result.stdout.splitlines() if " q_proj " in line]
    assert [line[0] for line in lines] == ["20", "300", "1000"]
    assert call("show", tmp_path / "t").output.startswith(result.stdout.split("\n\n")[0])
    assert "depth" in call("show", tmp_path / "t", "--by", "depth").output
    report = json.loads(call("analyze", base, out, "-o", tmp_path / "t", "--json", "--quiet").stdout)
    assert [row["step"] for row in report["steps"]] == [20, 300, 1000]
    rows = json.loads(call("export", tmp_path / "t", "--format", "json").stdout)
    assert rows == Trajectory.load(tmp_path / "t").to_dicts()
    plan = json.loads(call("analyze", base, out, "--dry-run", "--json").stdout)
    assert [row["step"] for row in plan] == [20, 300, 1000]
    assert call("analyze", base, out, "--dry-run").exit_code == 0
    written = call("plot", tmp_path / "t", "-o", tmp_path / "f", "--format", "svg").stdout.split()
    names = {"rank_by_step.svg", "rank_by_step.csv", "share_by_step.svg", "share_by_step.csv"}
    assert {Path(name).name for name in written} == names
    with pytest.raises(RunError, match="no finished matrix"):
        plot(Trajectory.create_or_resume(tmp_path / "empty", {"checkpoints": []}))


def test_steps_come_from_names_then_from_the_trainer_then_from_the_order(tmp_path):
    def make(name, state=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        if state is not None:
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": state}))
        return str(folder)

    named = [make(name) for name in ("a/step-00000300", "a/checkpoint-20", "a/global_step1000", "a/run_step7")]
    assert [step for step, _ in find_checkpoints(named)] == [7, 20, 300, 1000]
    assert find_checkpoints(["EleutherAI/pythia-70m@step3000"]) == [(3000, "EleutherAI/pythia-70m@step3000")]
    told = [make("b/late", 50), make("b/early", 5)]
    assert find_checkpoints(told) == [(5, told[1]), (50, told[0])]
    plain = [make("c/second"), make("c/first")]
    assert find_checkpoints(plain) == [(1, plain[0]), (2, plain[1])]
    with pytest.raises(OptionError, match="while others have one"):
        find_checkpoints([*plain, *named])
    with pytest.raises(OptionError, match="Two checkpoints are of step 20"):
        find_checkpoints([*named, make("d/checkpoint-20")])


def write_training(folder, base, states, *, report, save):
    for step, state in states.items():
        save(folder / "checkpoints" / f"step-{step:08}", state)
    (folder / "train.json").write_text(json.dumps({"format": 1, "base": {"ref": str(base)}, **report}))
    return folder


def test_a_training_folder_stands_for_its_checkpoints_and_its_end(training, tmp_path):
    base, _ = training
    state = load_file(base / "model.safetensors")

    def save(folder, size):
        write(folder, {name: tensor + size for name, tensor in state.items()}, LLAMA.config)

    results = {"results": {"steps": 250}}
    folder = write_training(tmp_path / "training", base, {100: 0.1, 200: 0.2}, report=results, save=save)
    save(folder / "final", 0.25)
    (folder / "checkpoints" / "step-00000300.77.tmp").mkdir()
    assert [step for step, _ in find_checkpoints([folder])] == [100, 200, 250]
    (folder / "train.json").write_text(json.dumps({"format": 1, "results": {"steps": 200}}))
    assert [step for step, _ in find_checkpoints([folder])] == [100, 200]
    rates = tmp_path / "rates"
    shutil.copytree(folder, rates / "lr-0.1")
    (rates / "train.json").write_text(json.dumps({"format": 1, "runs": [], "best": "lr-0.1"}))
    assert [Path(ref).parts[-3] for _, ref in find_checkpoints([rates])] == ["lr-0.1", "lr-0.1"]
    with pytest.raises(RunError, match=rf"^'{base}' is no training folder \(it has no train\.json\): pass what"):
        read_report(base)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.json").write_text('{"format"')
    with pytest.raises(RunError, match="cannot be read .*--overwrite"):
        read_report(tmp_path / "torn")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "train.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        find_checkpoints([tmp_path / "young"])


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_adapter_checkpoints_of_a_training(tmp_path, method, monkeypatch):
    room, name = (attached_matrix, "norm_of") if method == "vera" else (stored_matrix, "_norm_of")
    asked, original = [], getattr(room, name)
    monkeypatch.setattr(room, name, lambda *given: (asked.append(given), original(*given))[1])
    base = tiny_models.save(tiny_models.build("llama"), tmp_path / "base")
    model = tiny_models.build("llama")
    freeze(model)
    sites = [site for site in list_sites(model, split=False) if site.key.role in ("q_proj", "v_proj")]
    attachment = METHODS[method].attach(model, sites, METHODS[method].options(rank=2), name="a", seed=0)

    def save(folder, size):
        with torch.no_grad():
            for parameter in attachment.trained().values():
                parameter.fill_(size)
        save_adapter(folder, attachment, base=str(base), task_type="CAUSAL_LM", heads={})

    folder = write_training(tmp_path / "out", base, {10: 0.1, 20: 0.2}, report={"results": {}}, save=save)
    found = trajectory(base, [folder], tmp_path / "t", options=CPU)
    assert found.steps == [10, 20]
    assert len(asked) == 4  # norms of the base are those of the step before
    first, second = ({r.store_key: r.metrics["frobenius_norm"] for r in run.records} for run in found.runs)
    assert len(first) == 4
    assert all(second[key] == pytest.approx(4 * first[key], rel=1e-6) for key in first)  # both factors doubled
    assert found.runs[0].records[0].metrics["rank_90"] == (1 if method == "lora" else 2)


def test_vectors_alone_are_said_to_have_changed(training, tmp_path):
    """A table of zeros below which nothing stood."""
    base, _ = training
    state = load_file(base / "model.safetensors")
    for step, size in ((1, 0.0), (2, 0.1)):
        norms = {name: tensor + size * (tensor.ndim < 2) for name, tensor in state.items()}
        write(tmp_path / "norms" / f"step-{step}", norms, LLAMA.config)
    said = call("analyze", base, tmp_path / "norms", "-o", tmp_path / "t", "--quiet").stdout
    changed = sum(tensor.ndim < 2 for tensor in state.values())
    assert f"\nNo matrix changed, only vectors: {changed} of role norm; " in said
    assert "only vectors" in call("show", tmp_path / "t").stdout
    alike = call("analyze", base, tmp_path / "norms" / "step-1", base, "-o", tmp_path / "u", "--quiet")
    assert "only vectors" not in alike.stdout


def test_a_training_s_final_folder_has_its_last_step(tmp_path):
    folder = tmp_path / "training"
    for place in (folder / "final", folder / "checkpoints" / "step-00000010", tmp_path / "final"):
        place.mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, place / "model.safetensors")
    (folder / "train.json").write_text(json.dumps({"format": 1, "results": {"steps": 25}}))
    step = str(folder / "checkpoints" / "step-00000010")
    assert find_checkpoints([str(folder / "final"), step]) == [(10, step), (25, str(folder / "final"))]
    with pytest.raises(OptionError, match="while others have one"):
        find_checkpoints([str(tmp_path / "final"), step])


def test_activation_methods_are_refused(tmp_path):
    base = tiny_models.save(tiny_models.build("llama"), tmp_path / "base")
    model = tiny_models.build("llama")
    freeze(model)
    options = METHODS["series"].options()
    attachment = METHODS["series"].attach(model, list_sites(model, split=False), options, name="a", seed=0)

    def save(place, _):
        save_adapter(place, attachment, base=str(base), task_type=None, heads={})

    folder = write_training(tmp_path / "out", base, {10: 0}, report={}, save=save)
    with pytest.raises(PairingError, match="no ΔW to decompose"):
        trajectory(base, [folder], tmp_path / "t")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_deltaspec_train_leaves_is_a_trajectory(tmp_path, method):
    base = tiny_models.save(tiny_models.build("llama"), tmp_path / "base")
    data = tiny_models.write_text(tmp_path / "data.txt", lines=40)
    recipe = Recipe(
        DataSources(data),
        method=method,
        data=DataOptions(task="causal-lm", length=16),
        loop=LoopOptions(lr=1e-2, steps=5, batch=2),
        run=RunOptions(device="cpu", checkpoint_every=2),
    )
    train(base, tmp_path / "out", recipe)
    found = trajectory(base, [tmp_path / "out"], tmp_path / "t", options=CPU)
    assert found.steps == [2, 4, 5]
    assert found.complete
    norms = [
        [r.metrics["frobenius_norm"] for r in run.records if r.key.role == "v_proj" and r.metrics["frobenius_norm"]]
        for run in found.runs
    ]
    assert [len(row) for row in norms] == [2, 2, 2]
    assert sum(norms[0]) < sum(norms[1])
