"""What other tools get wrong with adapters, end to end, with PEFT, transformers and NumPy as judges."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import deltaspec
from deltaspec.errors import PairingError
from tests.families import write
from tests.oracle.parity import QUIET, attach, distance, load, outputs
from tests.oracle.street import (
    CPU,
    FULL,
    Pair,
    adapter_config,
    command,
    config_of,
    effect,
    extract,
    fine_tune,
    relative,
    settings,
    stored,
)
from tests.workflows.test_extract import products

pytestmark = QUIET
EXACT, SEEN = 1e-5, 1e-2  # of outputs: the same, and clearly another


@pytest.mark.parametrize("name", ["bert", "gpt2", "starcoder2"])
def test_1_biases_are_carried_on_request_and_named_without(name, tmp_path):
    linear = r"query\.|dense\.|c_attn|c_fc|mlp\.c_proj|q_proj"
    pair = fine_tune(name, tmp_path, linear)
    quiet = next(key for key in pair.before if re.search(linear, key) and key.endswith("weight"))
    pair.after[quiet] = pair.before[quiet]  # a module of which the bias alone moved
    pair.write(pair.tuned, kept=linear)
    energy = {key: float((pair.change(key) ** 2).sum()) for key in pair.before}
    biases = {key for key in energy if energy[key] and key.endswith("bias")}
    report = extract(pair, tmp_path / "plain")
    listed = {row["tensor"]: row["share"] for row in report["not_carried"]}
    assert set(listed) == biases
    for key, share in listed.items():
        assert share == pytest.approx(energy[key] / sum(energy.values()), rel=1e-6)
        assert f"`{key}`" in (tmp_path / "plain" / "README.md").read_text()
    assert not any("bias" in key for key in stored(tmp_path / "plain"))
    found, apart = effect(pair.base, tmp_path / "plain", pair.write(tmp_path / "weights", kept=r"weight$"))
    assert (found <= EXACT, apart > SEEN) == (True, True)
    assert effect(pair.base, tmp_path / "plain", pair.tuned)[0] > SEEN
    report = extract(pair, tmp_path / "bias", extras="bias")
    assert report["not_carried"] == []
    assert adapter_config(tmp_path / "bias")["lora_bias"] is True
    assert {key.replace("lora_B.", "") for key in stored(tmp_path / "bias") if key.endswith("bias")} >= biases
    assert effect(pair.base, tmp_path / "bias", pair.tuned)[0] <= EXACT


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "mixtral_stacked", "granitemoe", "gpt_oss"])
def test_2_every_expert_is_carried_exactly(name, tmp_path):
    """Each expert has a change of its own size, one has none; parameters are compared, for routers skip experts."""
    pair = fine_tune(name, tmp_path, "q_proj")
    generator = torch.Generator().manual_seed(2)
    matrices = 0
    for key, tensor in pair.before.items():
        if not re.search(r"experts\..*(proj|w\d)(\.weight)?$|(input|output)_linear", key):
            continue
        whole = tensor if tensor.ndim == 3 else tensor[None]
        one = re.search(r"experts\.(\d+)", key)
        sizes = torch.tensor([int(one[1])] if one else range(len(whole))).view(-1, 1, 1) * 0.1  # expert 0 stays
        matrices += int((sizes != 0).sum())
        update = torch.randn(*whole.shape[:2], 2, generator=generator) @ torch.randn(
            len(whole), 2, whole.shape[2], generator=generator
        )
        pair.after[key] = (whole + sizes * update).reshape(tensor.shape)
    write(pair.tuned, pair.after, config_of(pair.base))
    report = extract(pair, tmp_path / "out")
    assert report["not_carried"] == []
    assert matrices >= 4
    assert sum(row["expert"] is not None for row in report["matrices"]) >= matrices
    merged = attach(pair.base, tmp_path / "out").merge_and_unload()
    found, wanted, start = (model.state_dict() for model in (merged, load(pair.tuned), load(pair.base)))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, atol=3e-6), key
    experts = {key for key in wanted if "experts" in key and not torch.equal(wanted[key], start[key])}
    assert experts
    for key in experts:
        assert torch.equal(found[key][0], start[key][0])
        assert all(not torch.equal(one, other) for one, other in zip(found[key][1:], start[key][1:], strict=True))
    assert effect(pair.base, tmp_path / "out", pair.tuned)[0] <= EXACT


@pytest.mark.parametrize("form", [{}, {"split_fused": True}], ids=["whole", "split"])
@pytest.mark.parametrize(("policy", "amount"), [("rank", FULL), ("error", 1e-6)])
def test_3_gpt2s_conv1d_gets_factors(policy, amount, form, tmp_path):
    pair = fine_tune("gpt2", tmp_path, r"c_(attn|proj|fc)\.weight")
    report = extract(pair, tmp_path / "out", policy, amount, **form)
    found = stored(tmp_path / "out")
    changed = [key.removesuffix(".weight") for key in pair.before if (pair.change(key) != 0).any()]
    assert set(found) == {f"{path}.lora_{side}.weight" for path in changed for side in "AB"}
    for path in changed:
        d_in, d_out = pair.before[f"{path}.weight"].shape  # as Conv1D stores it
        assert found[f"{path}.lora_A.weight"].shape[1] == d_in
        assert found[f"{path}.lora_B.weight"].shape[0] == d_out
    assert {module["kind"] for module in report["modules"].values()} == {"conv1d"}
    assert adapter_config(tmp_path / "out")["fan_in_fan_out"] is True
    far, apart = effect(pair.base, tmp_path / "out", pair.tuned)
    assert (far <= EXACT, apart > SEEN) == (True, True)


@pytest.mark.parametrize(
    ("policy", "amount"), [("rank", 4), ("energy", 0.9), ("error", 0.1), ("params", 500), ("above_rounding", 1)]
)
def test_4_unchanged_layers_are_left_out(policy, amount, tmp_path):
    pair = fine_tune("llama", tmp_path, r"layers\.1.*(q_proj|down_proj)")
    report = extract(pair, tmp_path / "out", policy, amount)
    config, found = adapter_config(tmp_path / "out"), stored(tmp_path / "out")
    changed = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert set(report["modules"]) == set(config["target_modules"]) == changed
    assert set(report["unchanged"]) == set(pair.before) - {f"{path}.weight" for path in changed}
    assert {re.sub(r"\.lora_[AB]\.weight", "", key) for key in found} == changed
    assert min(min(tensor.shape) for tensor in found.values()) >= 1
    assert min(config["r"], *config["rank_pattern"].values(), FULL) >= 1
    assert max(min(tensor.shape) for tensor in found.values()) <= 4  # the change is of rank 3
    lora = {key for key, _ in attach(pair.base, tmp_path / "out").named_parameters() if "lora_" in key}
    assert len(lora) == 4


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(12), nn.Linear(12, 12)


class Nested(nn.Module):
    """Modules whose names end as those of others do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.norm, self.proj, self.head = Tower(), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 7)

    def forward(self, x):
        x = torch.tanh(self.proj(self.norm(x)))
        return self.head(self.tower.norm(torch.tanh(self.tower.proj(x))))


def nested(state):
    model = Nested().eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("changed", "refused"), [
    (r"^proj\.weight", ""),
    (r"^tower\.proj\.weight", ""),
    (r"^(tower\.)?proj\.weight", ""),
    (r"^tower\.norm|^head\.weight", ""),
    (r"^proj\.weight|^tower\.norm", ""),
    (r"^norm|^head\.weight", r"^norm"),
])  # fmt: skip
def test_5_names_that_end_alike_hit_what_is_meant_only(changed, refused, tmp_path):
    """What PEFT could not tell apart is not stored and is listed; what is stored changes nothing else."""
    generator = torch.Generator().manual_seed(0)
    before = {key: torch.randn(t.shape, generator=generator) / 2 for key, t in Nested().state_dict().items()}
    after = {key: 1.5 * t + 0.1 if re.search(changed, key) else t for key, t in before.items()}
    pair = Pair(write(tmp_path / "base", before, {}), write(tmp_path / "tuned", after, {}), before, after)
    report = extract(pair, tmp_path / "out", extras="all")
    left = {key for key in before if refused and re.search(refused, key)}
    assert {row["tensor"] for row in report["not_carried"]} == left
    assert all("ends alike" in row["reason"] for row in report["not_carried"])
    x = torch.randn(5, 12, generator=generator)
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(nested(before), tmp_path / "out").eval()
        wanted = nested({key: before[key] if key in left else tensor for key, tensor in after.items()})(x)
        assert float((model(x) - wanted).abs().max()) <= EXACT
        assert float((nested(before)(x) - wanted).abs().max()) > SEEN
    whole = {key.partition(".modules_to_save")[0] for key in model.state_dict() if "modules_to_save" in key}
    meant = {key.rpartition(".")[0] for key in before if "norm" in key and re.search(changed, key)} - {"norm"}
    assert whole == {f"base_model.model.{path}" for path in meant}


def test_5_one_norm_of_many_is_stored_alone(tmp_path):
    pair = fine_tune("llama", tmp_path, r"q_proj|^model\.norm\.")
    extract(pair, tmp_path / "out", extras="all")
    assert adapter_config(tmp_path / "out")["modules_to_save"] == ["model.norm"]
    model = attach(pair.base, tmp_path / "out")
    held = {key.partition(".modules_to_save")[0] for key, _ in model.named_modules() if "modules_to_save" in key}
    assert held == {"base_model.model.model.norm"}
    assert distance(outputs(model), outputs(load(pair.tuned))) <= EXACT


@pytest.mark.parametrize("name", ["llama", "starcoder2"])
def test_6_a_grown_vocabulary(name, tmp_path):
    """Refused with advice; then its shared rows; then whole, for a base whose embeddings were resized. Tied as well."""
    vocabulary = r"embed_tokens|lm_head"
    pair = fine_tune(name, tmp_path, rf"{vocabulary}|q_proj\.weight")
    config = config_of(pair.base)
    rows = config["vocab_size"]
    grown = {key: torch.cat([t, t[:3] + 1]) for key, t in pair.after.items() if re.search(vocabulary, key)}
    write(pair.tuned, {**pair.after, **grown}, {**config, "vocab_size": rows + 3})
    refused = command("extract", pair.base, pair.tuned, "-o", tmp_path / "strict")
    assert refused.exit_code == 2
    assert all(said in refused.stderr for said in (f"({rows}, ", f"({rows + 3}, ", "--vocab common"))
    assert not (tmp_path / "strict").exists()
    flags = ("--rank", FULL, "--dtype", "fp32", "--vocab", "common")
    said = command("extract", pair.base, pair.tuned, "-o", tmp_path / "common", *flags)
    left = json.loads((tmp_path / "common" / "deltaspec.json").read_text())["not_carried"]
    assert {row["tensor"].partition(" ")[0] for row in left} == set(grown)
    for key in grown:
        assert re.search(rf"{re.escape(key)} \(rows {rows} to", said.stdout)
        assert key in (tmp_path / "common" / "README.md").read_text()
    shared = write(tmp_path / "shared", pair.after, config)
    assert effect(pair.base, tmp_path / "common", shared)[0] <= EXACT
    assert command("extract", pair.base, pair.tuned, "-o", tmp_path / "all", *flags, "--extras", "all").exit_code == 0
    assert f"resize_token_embeddings({rows + 3})" in (tmp_path / "all" / "README.md").read_text()
    model = load(pair.base)
    model.resize_token_embeddings(rows + 3)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "all").eval()
    assert distance(outputs(model), outputs(load(pair.tuned))) <= EXACT
    assert command("merge", pair.base, tmp_path / "all", "-o", tmp_path / "merged").exit_code == 0
    assert distance(outputs(load(tmp_path / "merged")), outputs(load(pair.tuned))) <= EXACT


def test_7_a_relative_path_with_one_slash_is_a_path(tmp_path, monkeypatch):
    """Offline and with the hub forbidden; the adapter then finds its base from another folder."""
    fine_tune("llama", tmp_path / "models", "q_proj")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pair = ("models/base", "models/tuned")
    flags = ("--rank", FULL, "--dtype", "fp32")
    for words in (
        ("extract", *pair, "-o", "out/lora", *flags),
        ("verify", *pair, "out/lora"),
        ("resize", "out/lora", *flags, "-o", "out/again"),
        ("combine", "out/lora:0.5", "out/again:0.5", *flags, "-o", "out/both"),
        ("merge", "models/base", "out/both", "-o", "out/merged"),
        ("analyze", "models/base", "out/lora", "-o", "out/run"),
    ):
        done = command(*words)
        assert done.exit_code == 0, (words, done.output)
    missing = command("extract", "models/none", "models/tuned", "-o", "out/x")
    assert missing.exit_code == 2
    assert "'models/none'" in missing.stderr
    assert "no such folder here" in missing.stderr
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: [])
    monkeypatch.chdir("/")
    for name in ("lora", "again", "both"):
        folder = tmp_path / "out" / name
        assert adapter_config(folder)["base_model_name_or_path"] == str((tmp_path / "models" / "base").resolve())
        (folder / "tokenizer_config.json").write_text("{}")  # else PEFT asks the hub for one
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert distance(outputs(model), outputs(load(tmp_path / "models" / "tuned"))) <= EXACT


def test_8_a_zero_delta_has_rank_zero_and_no_adapter(tmp_path):
    pair = fine_tune("llama", tmp_path, "never")
    run = deltaspec.analyze(pair.base, pair.tuned, tmp_path / "run", options=CPU)
    assert run.records
    for row in run.to_dicts():
        ranks = {name: value for name, value in row.items() if re.search(r"rank(_\d+|_above.*)?$", name)}
        assert len(ranks) >= 5
        assert set(ranks.values()) <= {0, 0.0}, row["tensor"]
        assert row["relative_norm"] == 0
    for policy, amount in (("rank", 4), ("energy", 0.9), ("error", 0.3), ("above_rounding", 1), ("params", 100)):
        with pytest.raises(PairingError, match="nothing to extract"):
            deltaspec.extract(pair.base, pair.tuned, tmp_path / "out", options=settings(policy, amount))
        assert not (tmp_path / "out").exists()
    moved = fine_tune("llama", tmp_path / "other", "q_proj")
    extract(moved, tmp_path / "lora")
    merged = deltaspec.merge(moved.base, [(tmp_path / "lora", 1.0), (tmp_path / "lora", -1.0)], tmp_path / "merged")
    assert merged.loss.relative is None
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in moved.before.items())


@pytest.mark.parametrize("name", ["starcoder2", "opt", "gpt2"])
def test_10_a_tied_head_is_carried_once_and_stays_tied(name, tmp_path):
    pair = fine_tune(name, tmp_path, r"embed_tokens|wte|q_proj\.weight|c_attn\.weight")
    assert not any("lm_head" in key for key in pair.before)
    (key,) = [key for key in pair.before if re.search("embed_tokens|wte", key)]
    report = extract(pair, tmp_path / "out")
    rows = [row["matrix"] for row in report["matrices"] if re.search("embed|wte|head", row["matrix"])]
    assert rows == [key]
    assert report["not_carried"] == []
    assert not any("lm_head" in row for row in report["unchanged"])
    far, apart = effect(pair.base, tmp_path / "out", pair.tuned)
    assert (far <= EXACT, apart > SEEN) == (True, True)
    deltaspec.merge(pair.base, [tmp_path / "out"], tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == pair.before.keys()
    assert relative(found[key].double().numpy() - pair.before[key].double().numpy(), pair.change(key)) < 1e-5
    model = load(tmp_path / "merged")
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert distance(outputs(model), outputs(load(pair.tuned))) <= EXACT
    assert json.loads(Path(tmp_path / "merged" / "config.json").read_text()) == config_of(pair.base)
    assert set(products(pair.base, tmp_path / "out")) == {row["matrix"] for row in report["matrices"]}
    run = deltaspec.analyze(pair.base, pair.tuned, tmp_path / "run", options=CPU)
    assert [r.key.tensor for r in run.records if re.search("embed_tokens|wte|lm_head", r.key.tensor)] == [key]
    assert np.isfinite([r.metrics["effective_rank"] for r in run.records]).all()
