"""Every form of adapter passes its own verification, and none does once its files are spoilt."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from deltaspec.errors import CheckpointError
from deltaspec.options import ExtractOptions, FormOptions, RankOptions
from deltaspec.workflows.extraction.extract import extract
from deltaspec.workflows.verification.verify import verify
from tests.families import FAMILIES, random_state, write
from tests.workflows.extraction.test_extract import CPU

NAMES = ["gpt2", "phi3", "mixtral", "mixtral_stacked", "starcoder2", "t5", "dinov2", "gpt_oss", "bert"]
FORMS = {
    "rank": {},
    "params": {"budget": True},
    "all": {"extras": "all"},
    "split": {"split_fused": True},
    "split_params": {"budget": True, "split_fused": True},
    "vllm": {"target": "vllm"},
}


def make(folder, name, *, budget=False, **form):
    """Write base and fine-tune, whose every tensor changed at full rank, and extract; returns folders and report."""
    family = FAMILIES[name]
    base, generator = random_state(family), torch.Generator().manual_seed(3)
    tuned = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    size = sum(math.prod(shape) for shape in family.tensors.values() if len(shape) > 1)
    ranks = RankOptions("params", (max(2000, size // 6),)) if budget else RankOptions(amounts=(3,))
    sides = write(folder / "base", base, family.config), write(folder / "tuned", tuned, family.config)
    options = ExtractOptions(ranks, FormOptions(dtype="fp32", **form), CPU)
    (report,) = extract(*sides, folder / "adapter", options=options).values()
    return (*sides, folder / "adapter"), report


def findings(folders):
    found = verify(*folders, options=CPU)
    assert found.claims
    return [*found.worse, *found.missing]


def spoil(adapter, pattern, change):
    """Change the last stored tensor of this name that is not zero, or delete it; returns its name."""
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    name = max(name for name, tensor in state.items() if re.search(pattern, name) and tensor.any())
    if change:
        state[name] = state[name] * change
    else:
        del state[name]
    save_file(state, file, metadata={"format": "pt"})
    return name


CASES = [(name, form) for name in NAMES for form in FORMS if form != "split_params" or name in ("gpt2", "phi3")]
CASES.remove(("gpt2", "vllm"))  # vLLM loads no adapters of it: tests/field/test_targets.py


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_good_adapter_passes_and_a_spoilt_one_does_not(name, form, tmp_path):
    folders, report = make(tmp_path, name, **FORMS[form])
    found = verify(*folders, options=CPU)
    assert (found.worse, found.missing, found.claims) == ((), (), True)
    assert found.totals.matrices == report["totals"]["matrices"]
    assert found.totals.error == pytest.approx(report["totals"]["error"], rel=1e-6)
    assert found.totals.optimum == pytest.approx(report["totals"]["optimum"], rel=1e-4)
    assert {row.matrix: row.rank for row in found.rows} == {r["matrix"]: r["rank"] for r in report["matrices"]}
    spoil(folders[2], r"lora_(embedding_)?B", 1.1)
    assert findings(folders)


@pytest.mark.parametrize("change", [1.1, None])
@pytest.mark.parametrize("head", ["lm_head", "embed_tokens"])
def test_the_factors_of_a_tied_head_are_checked(head, change, tmp_path):
    family = FAMILIES["starcoder2"]
    assert "lm_head.weight" not in family.tensors
    folders, _ = make(tmp_path, "starcoder2")
    name = spoil(folders[2], rf"{head}.*lora_(embedding_)?B", change)
    if not change:
        spoil(folders[2], rf"{head}.*lora_(embedding_)?A", None)
    assert [name for name in findings(folders) if head in name], name


def test_factors_that_nothing_claims_are_found(tmp_path):
    folders, _ = make(tmp_path, "phi3")
    path = folders[2] / "deltaspec.json"
    report = json.loads(path.read_text())
    gone = report["matrices"].pop(5)["matrix"]
    path.write_text(json.dumps(report))
    assert findings(folders) == [gone]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("llama", r"layers\.1\.input_layernorm", "model.layers.1.input_layernorm.weight"),
        ("vit", r"classifier\.weight|patch_embeddings\.projection\.lora_B\.bias", ""),
        ("dinov2", r"gate_proj\.lora_B\.bias", "encoder.layer.1.mlp.weights_in.bias"),
    ],
)
@pytest.mark.parametrize("change", [1.1, None])
def test_norms_and_biases_are_checked(name, pattern, expected, change, tmp_path):
    folders, _ = make(tmp_path, name, extras="all")
    assert not findings(folders)
    spoil(folders[2], pattern, change)
    found = findings(folders)
    assert found == [expected] if expected else len(found) == 1


KNOWN = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
UP = "model.layers.1.mlp.up_proj"
CONFIGS = {
    "another target": {"target_modules": ["mlp.down_proj"]},
    "excluded": {"exclude_modules": ["mlp.up_proj"]},
    "excluded by a pattern": {"exclude_modules": r".*layers\.1\.mlp\.up_proj"},
    "other layers": {"target_modules": ["up_proj"], "layers_to_transform": [0]},
    "other layers by their name": {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "saved instead": {"modules_to_save": ["mlp"]},
}


def targets(config, path):
    """Ask PEFT itself; what it excludes is an object that counts as true."""
    found = check_target_module_exists(config, path)
    return bool(found) and "Excluded" not in type(found).__name__


@pytest.mark.parametrize("change", CONFIGS)
def test_a_config_that_leaves_factors_out_is_found(change, tmp_path):
    folders, _ = make(tmp_path, "llama")
    path = folders[2] / "adapter_config.json"
    config = json.loads(path.read_text()) | CONFIGS[change]
    path.write_text(json.dumps(config))
    found = findings(folders)
    assert f"adapter_config.json leaves out '{UP}'" in found
    tuner = LoraConfig(**{name: value for name, value in config.items() if name in KNOWN})
    assert not targets(tuner, UP)
    for other in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        assert targets(tuner, other) != (f"adapter_config.json leaves out '{other}'" in found)


def test_a_config_that_saves_too_little_is_found(tmp_path):
    folders, _ = make(tmp_path, "llama", extras="all")
    path = folders[2] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["model.norm"]}))
    assert all("layernorm.weight" in text for text in findings(folders))
    assert len(findings(folders)) == 4


@pytest.mark.parametrize("text", ["[" * 200_000, '{"tuned": 3}', "[]", '{"matrices": [{"rank": 1e999}]}', "\xff"])
def test_damaged_claims_are_one_sentence(text, tmp_path):
    folders, report = make(tmp_path, "llama")
    if "matrices" in text:
        text = json.dumps({**report, "matrices": [{"matrix": "a", "error": 0, "rank": "R"}]}).replace('"R"', "1e999")
    (folders[2] / "deltaspec.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"deltaspec\.json.*extract the adapter again"):
        verify(*folders, options=CPU)
