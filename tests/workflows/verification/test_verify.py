"""Verification reads the files back and believes nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaspec.errors import CheckpointError, PairingError
from deltaspec.options import ExtractOptions, FormOptions, RankOptions
from deltaspec.workflows.extraction.combine import combine
from deltaspec.workflows.extraction.extract import extract
from deltaspec.workflows.merging.merge import merge
from deltaspec.workflows.verification.verify import verify
from tests.families import FAMILIES
from tests.workflows.extraction.test_extract import CPU, deltas, noisy_pair, planted_pair, products


@pytest.fixture
def extracted(tmp_path):
    pair = noisy_pair(tmp_path)
    options = ExtractOptions(RankOptions(amounts=(5,)), FormOptions(dtype="fp32"), CPU)
    extract(*pair, tmp_path / "adapter", options=options)
    return (*pair, tmp_path / "adapter")


def test_an_honest_adapter_is_as_good_as_it_claims(extracted):
    found = verify(*extracted, options=CPU)
    assert found.claims
    assert not found.worse
    assert not found.missing
    exact = deltas(*extracted[:2])
    assert {row.matrix for row in found.rows} == set(exact)
    for row in found.rows:
        values = np.linalg.svd(exact[row.matrix], compute_uv=False)
        assert row.rank == 5
        assert row.optimum == pytest.approx(np.sqrt((values[5:] ** 2).sum() / (values**2).sum()), rel=1e-9)
        assert row.error == pytest.approx(row.claimed, rel=1e-6)


def test_factors_that_were_spoilt_after_writing_are_found(extracted):
    file = extracted[2] / "adapter_model.safetensors"
    state = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    state[name][0] *= 1.1
    save_file(state, file)
    assert verify(*extracted, options=CPU).worse == ("model.layers.1.self_attn.q_proj.weight",)


def test_a_claim_that_no_factors_stand_behind_is_missing(extracted):
    file = extracted[2] / "adapter_model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
    save_file(state, file)
    assert verify(*extracted, options=CPU).missing == ("model.layers.1.mlp.up_proj.weight",)


def test_biases_and_whole_tensors_are_checked_too(tmp_path):
    base, tuned = planted_pair(tmp_path, FAMILIES["vit"])
    options = ExtractOptions(RankOptions(amounts=(3,)), FormOptions(extras="all"), CPU)
    extract(base, tuned, tmp_path / "adapter", options=options)
    found = verify(base, tuned, tmp_path / "adapter", options=CPU)
    assert {row.kind for row in found.rest} == {"bias", "whole"}
    assert all(row.right for row in found.rest)
    assert not found.worse
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    bias = next(name for name in state if name.endswith("lora_B.bias"))
    whole = next(name for name in state if ".lora_" not in name)
    state[bias][0] += 1e-3
    state[whole].reshape(-1)[0] += 1e-3
    save_file(state, file)
    assert len(verify(base, tuned, tmp_path / "adapter", options=CPU).worse) == 2


def test_claims_about_another_model_are_not_held_against_this_one(extracted, tmp_path):
    base, tuned, adapter = extracted
    assert not verify(base, base, adapter, options=CPU).claims
    combine([(adapter, 1.0)], tmp_path / "small", options=ExtractOptions(RankOptions(amounts=(2,)), analysis=CPU))
    found = verify(base, tuned, tmp_path / "small", options=CPU)
    assert not found.claims
    assert {row.rank for row in found.rows} == {2}


def test_damaged_claims_and_wrong_order_are_one_sentence(extracted):
    base, tuned, adapter = extracted
    with pytest.raises(PairingError, match="check the order"):
        verify(base, adapter, tuned, options=CPU)
    (adapter / "deltaspec.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"deltaspec\.json"):
        verify(base, tuned, adapter, options=CPU)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "mixtral_stacked", "bert", "phi3"])
def test_full_rank_extraction_of_a_merge_gives_the_delta_back(name, tmp_path):
    """Merge, then extract at full rank: ΔW again, and the certificate agrees with verify."""
    base, tuned = planted_pair(tmp_path, FAMILIES[name])
    full = ExtractOptions(RankOptions(amounts=(1000,)), FormOptions(dtype="fp32"), CPU)
    extract(base, tuned, tmp_path / "adapter", options=full)
    merge(base, [(tmp_path / "adapter", 1.0)], tmp_path / "merged")
    extract(base, tmp_path / "merged", tmp_path / "again", options=full)
    first, second = products(base, tmp_path / "adapter"), products(base, tmp_path / "again")
    assert first.keys() == second.keys()
    for key, product in first.items():
        assert np.linalg.norm(second[key] - product) <= 1e-5 * np.linalg.norm(product), key
    found = verify(base, tmp_path / "merged", tmp_path / "again", options=CPU)
    assert found.claims
    assert not found.worse


def test_the_sum_of_two_adapters_is_exact_and_recompressed_at_its_best(tmp_path):
    base, tuned = noisy_pair(tmp_path)
    for rank in (3, 4):
        extract(base, tuned, tmp_path / f"r{rank}", options=ExtractOptions(RankOptions(amounts=(rank,)), analysis=CPU))
    parts = [(tmp_path / "r3", 0.5), (tmp_path / "r4", -2.0)]
    combine(parts, tmp_path / "sum", options=ExtractOptions(RankOptions(amounts=(100,)), analysis=CPU))
    combine(parts, tmp_path / "best", options=ExtractOptions(RankOptions(amounts=(2,)), analysis=CPU))
    three, four = products(base, tmp_path / "r3"), products(base, tmp_path / "r4")
    exact, best = products(base, tmp_path / "sum"), products(base, tmp_path / "best")
    for key in three:
        dense = 0.5 * three[key] - 2 * four[key]
        u, s, vt = np.linalg.svd(dense)
        assert np.linalg.norm(exact[key] - dense) <= 1e-6 * np.linalg.norm(dense)
        assert np.linalg.norm(best[key] - (u[:, :2] * s[:2]) @ vt[:2]) <= 1e-5 * np.linalg.norm(dense)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] <= 7


def test_biases_and_whole_tensors_go_along_when_an_adapter_is_resized(tmp_path):
    base, tuned = planted_pair(tmp_path, FAMILIES["vit"])
    form = FormOptions(extras="all", dtype="fp32")
    extract(base, tuned, tmp_path / "all", options=ExtractOptions(RankOptions(amounts=(3,)), form, CPU))
    smaller = ExtractOptions(RankOptions(amounts=(2,)), FormOptions(dtype="fp32"), CPU)
    combine([(tmp_path / "all", 1.0)], tmp_path / "small", options=smaller)
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("all", "small"))
    assert before.keys() == after.keys()
    kept = [name for name in before if "lora_A" not in name and "lora_B.weight" not in name]
    assert any("bias" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    with pytest.raises(PairingError, match="whole"):
        combine([(tmp_path / "all", 0.5)], tmp_path / "half", options=replace(smaller))


def test_adapters_that_cancel_are_no_adapter_and_change_nothing(extracted, tmp_path):
    base, _, adapter = extracted
    with pytest.raises(PairingError, match="is zero"):
        combine([(adapter, 1.0), (adapter, -1.0)], tmp_path / "none", options=ExtractOptions(analysis=CPU))
    report = merge(base, [(adapter, 1.0), (adapter, -1.0)], tmp_path / "merged")
    assert report.remark() == ""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_factors_for_a_change_that_is_not_there_are_infinitely_wrong(extracted):
    base, _, adapter = extracted
    found = verify(base, base, adapter, options=CPU)
    assert found.totals.error == np.inf
    assert {row.error for row in found.rows} == {np.inf}


def test_a_resized_adapter_loads_by_the_class_that_it_came_from(extracted, tmp_path):
    config = json.loads((extracted[2] / "adapter_config.json").read_text())
    combine([(extracted[2], 1.0)], tmp_path / "small", options=ExtractOptions(RankOptions(amounts=(2,)), analysis=CPU))
    assert config["task_type"] == "CAUSAL_LM"
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
