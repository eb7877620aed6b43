"""Adapters as the tuned side: their spectra equal those of the dense product, which is never formed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltaspec
from deltaspec.errors import PairingError
from tests.families import FAMILIES, random_state, write

OPTIONS = deltaspec.AnalyzeOptions(device="cpu", vectors=2)


def adapter(folder, factors, *, alpha=8, r=4, **config):
    """Write a PEFT LoRA folder: factors maps a module path to (A, B)."""
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(factors),
    }
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    state = {}
    for path, (a, b) in factors.items():
        state[f"base_model.model.{path}.lora_A.weight"], state[f"base_model.model.{path}.lora_B.weight"] = a, b
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def factors(d_out, d_in, r=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g)


def assert_spectrum(run, record, dense):
    exact = np.linalg.svd(dense, compute_uv=False)
    found = run.spectrum(record.store_key)
    k = len(found.singular_values)
    assert np.allclose(found.singular_values.numpy(), exact[:k], rtol=1e-10, atol=1e-10)
    assert np.allclose(exact[k:], 0, atol=1e-9)
    u, s, vt = np.linalg.svd(dense)
    assert np.allclose(
        ((found.left * found.singular_values[:2]) @ found.right.mT).numpy(), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5
    )


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_an_adapter_against_its_base(rslora, scaling, tmp_path):
    family = FAMILIES["llama"]
    state = random_state(family)
    base = write(tmp_path / "base", state, family.config)
    names = [n.removesuffix(".weight") for n in state if "q_proj" in n or "down_proj" in n]
    parts = {n: factors(*state[f"{n}.weight"].shape, seed=i) for i, n in enumerate(names)}
    run = deltaspec.analyze(
        base, adapter(tmp_path / "lora", parts, use_rslora=rslora), tmp_path / "run", options=OPTIONS
    )
    assert {r.key.tensor for r in run.records} == {f"{n}.weight" for n in names}
    for record in run.records:
        a, b = parts[record.key.tensor.removesuffix(".weight")]
        assert_spectrum(run, record, scaling * (b.double() @ a.double()).numpy())
        weight = state[record.key.tensor].double()
        assert record.metrics["base_norm"] == pytest.approx(float(weight.norm()), rel=1e-12)
        assert record.metrics["rank_above_rounding"] == 4
        assert record.metrics["resolved"] is True


@pytest.mark.parametrize(
    ("name", "module"), [("gpt2", "attn.c_attn"), ("gpt_neox", "query_key_value"), ("phi3", "qkv_proj")]
)
def test_a_fused_module_gives_each_part_its_rows(name, module, tmp_path):
    """The adapter merged into the base as a checkpoint must give the same spectra part by part."""
    family = FAMILIES[name]
    state = random_state(family, dtype=torch.float64)
    tensor = next(n for n in state if module in n and n.endswith("weight"))
    stored = state[tensor]
    shape = tuple(stored.shape[::-1]) if name == "gpt2" else tuple(stored.shape)
    a, b = (f.double() for f in factors(*shape))
    merged = dict(state)
    merged[tensor] = stored + 2 * ((b @ a).T if name == "gpt2" else b @ a)
    base, tuned = write(tmp_path / "base", state, family.config), write(tmp_path / "tuned", merged, family.config)
    lora = adapter(tmp_path / "lora", {tensor.removesuffix(".weight"): (a, b)}, fan_in_fan_out=name == "gpt2")
    low = deltaspec.analyze(base, lora, tmp_path / "low", options=OPTIONS)
    dense = deltaspec.analyze(base, tuned, tmp_path / "dense", options=OPTIONS)
    assert len(low.records) == 3
    for record in low.records:
        full = dense.spectrum(record.store_key).singular_values
        assert torch.allclose(low.spectrum(record.store_key).singular_values, full[:4], rtol=1e-9)
        twin = next(r for r in dense.records if r.store_key == record.store_key)
        assert record.metrics["base_norm"] == pytest.approx(twin.metrics["base_norm"], rel=1e-12)


def test_adapter_against_adapter_is_the_difference_of_products(tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    one, other, alone = factors(12, 10), factors(12, 10, seed=1), factors(6, 10, seed=2)
    first = adapter(tmp_path / "one", {path: one})
    second = adapter(tmp_path / "two", {path: other, "model.layers.0.self_attn.k_proj": alone}, alpha=4)
    run = deltaspec.analyze(first, second, tmp_path / "run", options=OPTIONS)
    dense = {
        path: 1.0 * (other[1].double() @ other[0].double()) - 2.0 * (one[1].double() @ one[0].double()),
        "model.layers.0.self_attn.k_proj": alone[1].double() @ alone[0].double(),
    }
    assert {r.key.role for r in run.records} == {"q_proj", "k_proj"}
    for record in run.records:
        assert_spectrum(run, record, dense[record.key.tensor.removesuffix(".weight")].numpy())
    q = next(r for r in run.records if r.key.role == "q_proj")
    assert q.metrics["base_norm"] == pytest.approx(2 * float((one[1].double() @ one[0].double()).norm()), rel=1e-9)


def test_wrong_bases_are_refused_by_name_and_shape(tmp_path):
    family = FAMILIES["llama"]
    state = random_state(family)
    base = write(tmp_path / "base", state, family.config)
    with pytest.raises(PairingError, match="targets 'elsewhere.weight'"):
        deltaspec.analyze(base, adapter(tmp_path / "a", {"elsewhere": factors(4, 4)}), tmp_path / "r", options=OPTIONS)
    name = next(n for n in state if "q_proj" in n).removesuffix(".weight")
    with pytest.raises(PairingError, match="base has shape"):
        deltaspec.analyze(base, adapter(tmp_path / "b", {name: factors(5, 7)}), tmp_path / "r", options=OPTIONS)
    with pytest.raises(PairingError, match="swap the two"):
        deltaspec.analyze(tmp_path / "b", base, tmp_path / "r", options=OPTIONS)


def test_modules_saved_whole_pair_with_the_base_or_are_listed(tmp_path):
    """A classification head that the base never had is no reason to stop."""
    family = FAMILIES["llama"]
    state = random_state(family)
    base = write(tmp_path / "base", state, family.config)
    name = next(n for n in state if "q_proj" in n).removesuffix(".weight")
    norm, embed = next(n for n in state if n.endswith("norm.weight")), next(n for n in state if "embed" in n)
    lora = adapter(tmp_path / "lora", {name: factors(*state[f"{name}.weight"].shape)})
    stored = load_file(lora / "adapter_model.safetensors")
    whole = {norm: state[norm] + 1, embed: state[embed] + 1, "score.weight": torch.ones(2, 3)}
    save_file({**stored, **{f"base_model.model.{n}": t for n, t in whole.items()}}, lora / "adapter_model.safetensors")
    run = deltaspec.analyze(base, lora, tmp_path / "run", options=OPTIONS)
    assert {r.key.tensor for r in run.records} == {f"{name}.weight", embed}
    full = next(r for r in run.records if r.key.tensor == embed)
    assert full.metrics["frobenius_norm"] == pytest.approx(math.sqrt(state[embed].numel()), rel=1e-6)
    assert [row["tensor"] for row in run.vectors] == [norm]
    assert [row["tensor"] for row in run.skipped] == ["score.weight"]
    other = write(tmp_path / "other", state | {"score.weight": torch.ones(3, 3)}, family.config)
    run = deltaspec.analyze(other, lora, tmp_path / "other run", options=OPTIONS)
    assert run.skipped == [{"tensor": "score.weight", "reason": "a task head of another shape than the base's"}]
    with pytest.raises(PairingError, match="Cannot pair 'score.weight'"):
        deltaspec.merge(other, [lora], tmp_path / "merged")


def test_a_side_that_is_only_factors_has_no_spectrum_of_its_own(tmp_path):
    family = FAMILIES["llama"]
    state = random_state(family)
    base = write(tmp_path / "base", state, family.config)
    name = next(n for n in state if "q_proj" in n).removesuffix(".weight")
    lora = adapter(tmp_path / "lora", {name: factors(*state[f"{name}.weight"].shape)})
    options = deltaspec.AnalyzeOptions(device="cpu", spectra=("delta", "base", "tuned"))
    run = deltaspec.analyze(base, lora, tmp_path / "run", options=options)
    assert {r.spectrum_of for r in run.records} == {"delta", "base"}
    assert not run.failures
    assert "merged" in next(row["reason"] for row in run.skipped if row["tensor"] == f"{name}.weight#tuned")


def test_an_adapter_against_itself_is_zero(tmp_path):
    lora = adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": factors(12, 10)})
    (record,) = deltaspec.analyze(lora, lora, tmp_path / "run", options=OPTIONS).records
    assert (record.method, record.metrics["effective_rank"], record.metrics["rank_90"]) == ("zero", 0, 0)


def test_an_adapters_bias_is_scaled(tmp_path):
    family = FAMILIES["gpt2"]
    state = random_state(family)
    base = write(tmp_path / "base", state, family.config)
    name = next(n for n in state if n.endswith("mlp.c_fc.weight")).removesuffix(".weight")
    lora = adapter(tmp_path / "lora", {name: factors(*state[f"{name}.weight"].shape[::-1])}, lora_bias=True)
    stored = load_file(lora / "adapter_model.safetensors")
    bias = torch.randn(state[f"{name}.bias"].shape, generator=torch.Generator().manual_seed(5))
    save_file({**stored, f"base_model.model.{name}.lora_B.bias": bias}, lora / "adapter_model.safetensors")
    run = deltaspec.analyze(base, lora, tmp_path / "run", options=OPTIONS)
    (row,) = run.vectors
    assert row["tensor"] == f"{name}.bias"
    expected = 2 * float(bias.double().norm() / state[f"{name}.bias"].double().norm())
    assert row["relative_norm"] == pytest.approx(expected, rel=1e-12)


def test_factors_of_a_head_that_the_base_ties_pair_with_its_embedding(tmp_path):
    embed = "model.embed_tokens.weight"
    state = {embed: torch.randn(9, 4), "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4)}
    base = write(tmp_path / "base", state, {"model_type": "llama"})
    lora = adapter(tmp_path / "lora", {"lm_head": factors(9, 4)})
    run = deltaspec.analyze(base, lora, tmp_path / "run", options=OPTIONS)
    assert run.records[0].metrics["base_norm"] == pytest.approx(float(state[embed].double().norm()))
    assert any("tied" in note for note in run.manifest["notes"])


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("alpha", [8, 3])
def test_factors_of_head_and_embedding_are_one_change_where_they_are_equal(same, alpha, tmp_path):
    embed = "model.embed_tokens"
    state = {f"{embed}.weight": torch.randn(9, 4), "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4)}
    base = write(tmp_path / "base", state, {"model_type": "llama"})
    first, second = factors(9, 4), factors(9, 4, seed=0 if same else 1)
    lora = adapter(tmp_path / "lora", {embed: first, "lm_head": second}, alpha=alpha)
    run = deltaspec.analyze(base, lora, tmp_path / "run", options=OPTIONS)
    notes = " ".join(run.manifest["notes"])
    assert ("is tied to" in notes, "has factors of its own" in notes) == (same, not same)
    assert {r.key.role for r in run.records} == ({"embed"} if same else {"embed", "lm_head"})
    for record in run.records:
        a, b = first if record.key.role == "embed" else second
        assert record.metrics["frobenius_norm"] == pytest.approx(alpha / 4 * float((b.double() @ a.double()).norm()))
        assert record.metrics["base_norm"] == pytest.approx(float(state[f"{embed}.weight"].double().norm()))
