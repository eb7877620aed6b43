"""What a method changes in a running model, analysed in place, against files, NumPy and PEFT."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner

from deltaspec.cli.main import cli
from deltaspec.errors import CheckpointError, NumericalError, PairingError
from deltaspec.options import AnalyzeOptions, TargetOptions
from deltaspec.pairing.plan import HEAD
from deltaspec.training.methods import METHODS
from deltaspec.training.sites.attachment import freeze
from deltaspec.training.sites.model_sites import list_sites, module_at
from deltaspec.training.sites.targets import choose_sites
from deltaspec.workflows.analysis.analyze import analyze, plan_analysis
from deltaspec.workflows.analysis.attached_adapter import WHOLE
from deltaspec.workflows.analysis.live import analyze_live
from deltaspec.workflows.shared.opened_base import Base
from deltaspec.workflows.training.saved_adapters import save_adapter
from tests import tiny_models

FITTING = {"vblora": {"vector_length": 4, "vectors": 6}, "lora": {"rank": 3, "alpha": 5.0}, "lora_xs": {"rank": 3}}
WEIGHTS = [name for name, method in METHODS.items() if method.space == "weight"]
ROUNDING = {"unchanged_fraction", "update_to_ulp", "rounding_edge", "rank_above_rounding", "energy_above_rounding"}
CPU = AnalyzeOptions(device="cpu", workers=1)


def options_of(method, **changed):
    kind = METHODS[method].options
    known = set(kind.__dataclass_fields__)
    wanted = {"rank": 4, **FITTING.get(method, {}), **changed}
    return kind(**{name: value for name, value in wanted.items() if name in known})


def attach(model, method, *, targets="attention", seed=3, **changed):
    """A method on a model, at a state far from its start."""
    freeze(model)
    sites = choose_sites(model, TargetOptions(targets)) if METHODS[method].sites else list_sites(model, split=False)
    attachment = METHODS[method].attach(model, sites, options_of(method, **changed), name="mine", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.trained().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return attachment


def write_adapter(folder, attachment):
    save_adapter(folder, attachment, base="base", task_type=None, heads={})
    return folder


def same_records(one, other, *, names=None, rel=1e-9):
    left, right = ({r.store_key: r for r in run.records} for run in (one, other))
    assert left
    for key, record in left.items():
        metrics = right[key].metrics
        assert (record.key, record.shape) == (right[key].key, right[key].shape)
        for name in names or metrics:
            assert record.metrics[name] == (None if metrics[name] is None else pytest.approx(metrics[name], rel=rel)), (
                key,
                name,
            )


def dense_change(attachment, site):
    """ΔW of a linear module from what it puts out for the unit vectors, with the method and without."""
    wrapped = attachment.model.get_submodule(site.path)
    units = torch.eye(site.shape[1])
    with torch.no_grad():
        return (wrapped(units) - module_at(attachment.model, site.path)(units)).double().T.numpy()


CASES = [("gpt2", "q_proj,v_proj"), ("gpt2", "attention,embed"), ("llama", "all")]


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_live_lora_equals_the_written_adapter(tmp_path, family, targets):
    model = tiny_models.build(family)
    base = tiny_models.save(model, tmp_path / "base")
    attachment = attach(model, "lora", targets=targets, lora_bias=targets == "all")
    live = analyze_live(attachment, options=CPU)
    stored = analyze(base, write_adapter(tmp_path / "adapter", attachment), tmp_path / "run", options=CPU)
    changed = {r.store_key for r in stored.records if r.metrics["frobenius_norm"]}
    assert changed == {r.store_key for r in live.records}
    same_records(live, stored, rel=1e-7)
    rows = {row["tensor"]: row for row in stored.vectors}
    assert len(live.vectors) == (len(attachment.sites) if targets == "all" else 0)
    for row in live.vectors:
        assert row["relative_norm"] == (
            rows[row["tensor"]]["relative_norm"] and pytest.approx(rows[row["tensor"]]["relative_norm"], rel=1e-6)
        )


@pytest.mark.parametrize(("family", "method"), [("llama", "full"), ("tied", "full"), ("classifier", "last_layers")])
def test_live_training_of_the_base_equals_the_written_checkpoint(tmp_path, family, method):
    model = tiny_models.build(family)
    base = tiny_models.save(model, tmp_path / "base")
    attachment = attach(model, method)
    every = AnalyzeOptions(device="cpu", spectra=("delta", "base", "tuned"))
    live = analyze_live(attachment, options=every)
    model.save_pretrained(tmp_path / "tuned")
    stored = analyze(base, tmp_path / "tuned", tmp_path / "run", options=every)
    names = set(live.records[0].metrics) - ROUNDING - {"resolved", "numerical_rank"}
    same_records(live, stored, names=names)
    assert live.records[0].metrics["rank_above_rounding"] is None
    trained = {r.store_key for r in stored.records if r.spectrum_of == "delta" and r.metrics["frobenius_norm"]}
    assert trained == {r.store_key for r in live.records if r.spectrum_of == "delta"}
    rows = {row["tensor"]: row for row in stored.vectors}
    assert live.vectors
    assert all(row == pytest.approx(rows[row["tensor"]]) for row in live.vectors)


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_stored_adapter_of_every_method_is_analysed(tmp_path, method):
    base = tiny_models.save(tiny_models.build("llama"), tmp_path / "base")
    model = tiny_models.build("llama")
    attachment = attach(model, method)
    run = analyze(base, write_adapter(tmp_path / "adapter", attachment), tmp_path / "run", options=CPU)
    assert {r.key.tensor for r in run.records} == {site.key.tensor for site in attachment.sites}
    for site in attachment.sites:
        change = dense_change(attachment, site)
        found = run.spectrum(site.key.tensor).singular_values.numpy()
        values = np.linalg.svd(change, compute_uv=False)
        assert np.abs(found - values[: len(found)]).max() < 1e-5 * values[0]
        assert values[len(found) :].sum() < 1e-4 * values[0]
        record = next(r for r in run.records if r.key == site.key)
        weight = module_at(model, site.path).weight.detach().double().numpy()
        assert record.metrics["relative_norm"] == pytest.approx(
            np.linalg.norm(change) / np.linalg.norm(weight), rel=1e-4
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_dora_of_peft_is_what_its_merged_model_changes(tmp_path):
    base = tiny_models.save(tiny_models.build("llama"), tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny_models.build("llama"), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "dora")
    merged = model.double().merge_and_unload().state_dict()
    before = tiny_models.build("llama").double().state_dict()
    run = analyze(base, tmp_path / "dora", tmp_path / "run", options=CPU)
    assert len(run.records) == 4
    for record in run.records:
        change = (merged[record.key.tensor] - before[record.key.tensor]).numpy()
        values = np.linalg.svd(change, compute_uv=False)
        assert np.abs(run.spectrum(record.store_key).singular_values.numpy() - values).max() < 1e-6 * values[0]
        assert record.metrics["numerical_rank"] == min(record.shape)
        assert record.metrics["rounding_edge"] == 0


def test_an_adapter_trained_with_a_head_fits_a_base_without(tmp_path):
    model = tiny_models.build("classifier")
    base = tiny_models.save(model.bert, tmp_path / "base")
    attachment = attach(model, "vera", targets="q_proj,down_proj")
    head = dict(model.classifier.state_dict(prefix="classifier."))
    save_adapter(tmp_path / "adapter", attachment, base="base", task_type="SEQ_CLS", heads=head)
    run = analyze(base, tmp_path / "adapter", tmp_path / "run", options=CPU)
    live = {r.key.tensor.removeprefix("bert."): r for r in analyze_live(attachment, options=CPU).records}
    assert live.keys() == {r.key.tensor for r in run.records}
    for record in run.records:
        other = live[record.key.tensor]
        assert (record.key.role, record.key.depth) == (other.key.role, other.key.depth)
        assert record.metrics["relative_norm"] == pytest.approx(other.metrics["relative_norm"], rel=1e-6)
    assert {row["tensor"] for row in run.skipped} == {"classifier.weight", "classifier.bias"}


OUTSIDE = ["vera", "dora", "vblora", "tied", "lora_xs"]


@pytest.mark.parametrize("method", OUTSIDE)
@pytest.mark.parametrize("side", ["bare", "other head"])
def test_a_classifier_s_adapter_is_what_its_factors_say(tmp_path, method, side):
    """Against its base without a head, and one whose head has other classes; each in float64 from its tensors."""
    model = tiny_models.build("classifier", num_labels=2)
    dora = method == "dora"
    attachment = attach(model, "lora" if dora else method, targets="all", dora=dora)
    other = tiny_models.build("classifier", num_labels=3)
    body = {n.replace(".base.", "."): t for n, t in model.bert.state_dict().items() if ".updates." not in n}
    other.bert.load_state_dict(body)
    base = tiny_models.save(other.bert if side == "bare" else other, tmp_path / "base")
    head = dict(model.classifier.state_dict(prefix="classifier."))
    save_adapter(tmp_path / "adapter", attachment, base="base", task_type="SEQ_CLS", heads=head)
    assert plan_analysis(Base(base), tmp_path / "adapter", CPU).attached
    run = analyze(base, tmp_path / "adapter", tmp_path / "run", options=CPU)
    prefix = "" if side == "bare" else "bert."
    names = {site.name: prefix + site.key.tensor.removeprefix("bert.") for site in attachment.sites}
    assert {r.key.tensor for r in run.records} == set(names.values())
    for site in attachment.sites:
        update, stored = attachment.updates[site.name], attachment.updates[site.name].tensors()
        pair = update.factors() or (stored["lora_A.weight"], update.scaling * stored["lora_B.weight"])
        lora_A, lora_B = (factor.detach().double().numpy() for factor in pair)
        change = lora_B @ lora_A
        if dora:
            weight = module_at(model, site.path).weight.detach().double().numpy()
            whole = weight + change
            magnitude = stored["lora_magnitude_vector"].detach().double().numpy()
            change = magnitude[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True) - weight
        values = np.linalg.svd(change, compute_uv=False)
        found = run.spectrum(names[site.name]).singular_values.numpy()
        assert np.abs(found - values[: len(found)]).max() < 1e-6 * values[0]
    reasons = {row["reason"] for row in run.skipped}
    assert {row["tensor"] for row in run.skipped} == {"classifier.weight", "classifier.bias"}
    assert reasons == {WHOLE if side == "bare" else HEAD}


@pytest.mark.parametrize("method", ["vera", "dora", "vblora"])
def test_a_dry_run_lists_what_the_run_will_hold_and_loads_no_weights(tmp_path, method, monkeypatch):
    base = tiny_models.save(tiny_models.build("gpt2"), tmp_path / "base")
    changed = {"dora": {"dora": True}, "vblora": {"save_topk": True}}.get(method, {})
    attachment = attach(tiny_models.build("gpt2"), method.replace("dora", "lora"), **changed)
    folder = write_adapter(tmp_path / "adapter", attachment)
    options = AnalyzeOptions(device="cpu", workers=1, exclude="c_proj")
    run = analyze(base, folder, tmp_path / "run", options=options)
    monkeypatch.setattr(
        "deltaspec.workflows.shared.opened_base.load_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    plan = plan_analysis(Base(base), folder, options)
    assert [str(key) for key, _ in plan.attached] == run.manifest["planned"] != []
    assert [shape for _, shape in plan.attached] == [(16, 16)] * 6
    assert [note.to_dict() for note in plan.skipped] == run.skipped != []
    assert ([str(note) for note in plan.notes], plan.family) == (run.manifest["notes"], run.manifest["family"])
    command = ["analyze", str(base), str(folder), "--exclude", "c_proj", "--dry-run"]
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 0
    assert "transformer.h.1.attn.c_attn.weight/v_proj  v_proj      1  16×16  attached" in said.stdout
    assert "attached to the running base." in said.stdout
    listed = json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)["pairs"]
    assert [row["matrix"] for row in listed] == run.manifest["planned"]
    steps = CliRunner().invoke(cli, ["analyze", str(base), str(folder), str(folder), "--dry-run", "--json"])
    assert [row["matrices"] for row in json.loads(steps.stdout)] == [8, 8]


def test_methods_that_change_no_weights_are_refused(tmp_path):
    base = tiny_models.save(tiny_models.build("llama"), tmp_path / "base")
    attachment = attach(tiny_models.build("llama"), "series")
    with pytest.raises(PairingError, match=r"no ΔW to decompose"):
        analyze_live(attachment)
    folder = write_adapter(tmp_path / "adapter", attachment)
    with pytest.raises(PairingError, match=r"no ΔW to decompose"):
        analyze(base, folder, tmp_path / "run")
    with pytest.raises(PairingError, match=r"no ΔW to decompose"):
        plan_analysis(Base(base), folder, CPU)
    assert not (tmp_path / "run").exists()


def test_an_unknown_kind_of_adapter_is_named(tmp_path):
    base = tiny_models.save(tiny_models.build("llama"), tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", attach(tiny_models.build("llama"), "vera"))
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"VERA"', '"LOKR"'))
    with pytest.raises(CheckpointError, match="LOKR"):
        analyze(base, folder, tmp_path / "run")


def test_without_a_folder_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    attachment = attach(tiny_models.build("llama"), "lora")
    before = {name: tensor.clone() for name, tensor in attachment.state().items()}
    run = analyze_live(attachment, options=AnalyzeOptions(device="cpu", vectors=2))
    spectrum = run.spectrum(run.records[0].store_key)
    assert spectrum.left is not None
    assert math.isclose(float(spectrum.singular_values.square().sum()), spectrum.energy)
    assert run.manifest["tuned"]["method"] == "lora"
    assert run.manifest["tuned"]["method_options"]["rank"] == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in attachment.state().items())
    assert list(tmp_path.iterdir()) == [run.path]
    del run
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_state_is_not_gone_on_with(tmp_path):
    attachment = attach(tiny_models.build("llama"), "lora")
    first = analyze_live(attachment, tmp_path / "run", options=CPU)
    assert [r.seconds for r in analyze_live(attachment, tmp_path / "run", options=CPU).records] == [
        r.seconds for r in first.records
    ]
    with torch.no_grad():
        next(iter(attachment.trained().values())).mul_(2)
    with pytest.raises(Exception, match="something else"):
        analyze_live(attachment, tmp_path / "run", options=CPU)


def test_a_diverged_update_is_a_failure_of_its_own(tmp_path):
    attachment = attach(tiny_models.build("llama"), "lora")
    with torch.no_grad():
        attachment.state()[next(n for n in attachment.state() if "layers.1.self_attn.q_proj" in n)][0, 0] = math.nan
    run = analyze_live(attachment, tmp_path / "run", options=CPU)
    assert list(run.failures) == ["model.layers.1.self_attn.q_proj.weight"]
    assert "did training diverge?" in run.failures["model.layers.1.self_attn.q_proj.weight"]
    assert len(run.records) == 7
    broken = tiny_models.build("llama")
    broken.model.layers[0].self_attn.q_proj.weight.data[0, 0] = math.inf
    with pytest.raises(NumericalError, match="base"):
        analyze_live(attach(broken, "lora"))


def test_include_and_exclude_search_names(tmp_path):
    attachment = attach(tiny_models.build("llama"), "lora")
    run = analyze_live(attachment, options=AnalyzeOptions(device="cpu", include=r"layers\.1\.", exclude="q_proj"))
    assert {r.key.depth for r in run.records} == {1}
    assert "q_proj" not in {r.key.role for r in run.records}
    assert len(run.skipped) == 5
    with pytest.raises(PairingError, match="loosen"):
        analyze_live(attachment, options=AnalyzeOptions(device="cpu", include="nothing"))


def test_path_arguments_may_be_text(tmp_path):
    run = analyze_live(attach(tiny_models.build("llama"), "lora"), str(tmp_path / "run"), options=CPU)
    assert run.path == Path(tmp_path / "run")
