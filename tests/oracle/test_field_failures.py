"""What other tools get wrong with adapters, end to end, with PEFT, transformers and NumPy as judges."""

from __future__ import annotations

import json
import re

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
from tests import tiny_models
from tests.families import write
from tests.oracle.parity import QUIET, attach, distance, load, outputs
from tests.oracle.street import (
    CPU,
    FULL,
    Pair,
    adapter_config,
    command,
    config_of,
    contents,
    effect,
    extract,
    fine_tune,
    low_rank,
    relative,
    settings,
    stored,
)
from tests.workflows.extraction.test_extract import products
from tests.workflows.merging.test_merge import summed

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


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral_stacked", "granitemoe", "gpt_oss"])
def test_2_every_expert_is_carried_exactly(name, tmp_path):
    """Each expert has a change of its own size, one has none; parameters are compared, for routers skip experts."""
    pair = fine_tune(name, tmp_path, r"q_proj\.weight")
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
    wanted = outputs(load(tmp_path / "models" / "tuned"))
    for name in ("lora", "again", "both"):
        folder = tmp_path / "out" / name
        assert adapter_config(folder)["base_model_name_or_path"] == str((tmp_path / "models" / "base").resolve())
        (folder / "tokenizer_config.json").write_text("{}")  # else PEFT asks the hub for one
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert distance(outputs(model), wanted) <= EXACT


def test_8_a_zero_delta_has_rank_zero_and_no_adapter(tmp_path):
    pair = fine_tune("llama", tmp_path, "never")
    run = deltaspec.analyze(pair.base, pair.tuned, tmp_path / "run", options=CPU)
    assert run.records
    for row in run.to_dicts():
        ranks = {name: value for name, value in row.items() if re.search(r"rank(_\d+|_above.*)?$", name)}
        assert len(ranks) >= 5
        assert set(ranks.values()) <= {0}, row["tensor"]
        assert row["relative_norm"] == 0
    for policy, amount in (("rank", 4), ("energy", 0.9), ("error", 0.3), ("above_rounding", 1), ("params", 100)):
        with pytest.raises(PairingError, match="nothing to extract"):
            deltaspec.extract(pair.base, pair.tuned, tmp_path / "out", options=settings(policy, amount))
        assert not (tmp_path / "out").exists()
    moved = fine_tune("llama", tmp_path / "other", "q_proj")
    extract(moved, tmp_path / "lora")
    deltaspec.merge(moved.base, [(tmp_path / "lora", 1.0), (tmp_path / "lora", -1.0)], tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in moved.before.items())


def test_9_no_command_touches_its_inputs(tmp_path):
    pair = [tiny_models.save(tiny_models.build("llama"), tmp_path / "base")]
    pair.append(tiny_models.save(tiny_models.perturb(tiny_models.build("llama")), tmp_path / "tuned"))
    text, lora, moments = tiny_models.write_text(tmp_path / "text.txt"), tmp_path / "lora", tmp_path / "m.safetensors"
    for words in (
        ("analyze", *pair, "-o", tmp_path / "run"),
        ("calibrate", pair[1], "--text", text, "--length", 8, "-o", moments),
        ("extract", *pair, "--rank", 4, "--extras", "all", "-o", lora),
        ("extract", *pair, "--rank", 4, "--calibration", moments, "-o", tmp_path / "aware"),
        ("extract", *pair, "--params", 900, "--run", tmp_path / "run", "-o", tmp_path / "budget"),
        ("extract", pair[0], lora, "--error", 0.5, "-o", tmp_path / "again"),
        ("verify", *pair, lora, "--text", text, "--tokens", 60),
        ("resize", lora, "--rank", 2, "-o", tmp_path / "small"),
        ("combine", tmp_path / "aware", tmp_path / "budget", "-o", tmp_path / "both"),
        ("merge", pair[0], lora, "-o", tmp_path / "merged", "--dtype", "bf16"),
        ("analyze", pair[0], lora, "-o", tmp_path / "low"),
    ):
        before, names = contents(tmp_path), set(contents(*pair, lora))
        done = command(*words)
        assert done.exit_code == 0, (words, done.output)
        assert before.items() <= contents(tmp_path).items(), words
        assert names in (set(contents(*pair, lora)), set(contents(*pair))), words  # lora itself is made once


@pytest.mark.parametrize("rslora", [False, True])
def test_9_scales_are_honoured_when_read_merged_and_written(rslora, tmp_path):
    """Two of PEFT's adapters with α ≠ r, in one sum; written with either scaling."""
    pair = fine_tune("llama", tmp_path, "never")
    dense, parts = {name: t.double() for name, t in pair.before.items()}, []
    for number, (r, alpha, own, weight) in enumerate(((3, 5, False, 0.5), (2, 7, True, -1.5))):
        options = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=own, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(load(pair.base), options)
        generator = torch.Generator().manual_seed(number)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path / f"peft{number}"
        model.save_pretrained(folder)
        parts.append((folder, weight))
        factors = stored(folder)
        for key in [key for key in factors if "lora_B" in key]:
            lora_B, lora_A = factors[key].double(), factors[key.replace("lora_B", "lora_A")].double()
            dense[key.replace("lora_B.", "")] += weight * alpha / (r**0.5 if own else r) * lora_B @ lora_A
    sums = write(tmp_path / "sum", {name: t.float() for name, t in dense.items()}, config_of(pair.base))
    deltaspec.combine(parts, tmp_path / "combined", options=settings(rslora=rslora))
    deltaspec.merge(pair.base, parts, tmp_path / "merged")
    deltaspec.extract(pair.base, tmp_path / "combined", tmp_path / "again", options=settings(rslora=rslora))
    wanted = outputs(load(sums))
    assert distance(outputs(load(pair.base)), wanted) > SEEN
    assert distance(outputs(load(tmp_path / "merged")), wanted) <= EXACT
    for name in ("combined", "again"):
        assert adapter_config(tmp_path / name)["use_rslora"] is rslora
        assert distance(outputs(attach(pair.base, tmp_path / name)), wanted) <= EXACT


def test_9_a_base_in_fp16_is_subtracted_from_an_fp32_fine_tune_exactly(tmp_path):
    """The update is as small as fp16's own rounding: subtracting in fp16 would lose most of it."""
    drawn = fine_tune("llama", tmp_path / "drawn", "never")
    before = {name: tensor.half() for name, tensor in drawn.before.items()}
    generator = torch.Generator().manual_seed(4)
    after = {
        name: t.float() + (3e-4 * torch.randn(t.shape, generator=generator) if "proj" in name else 0)
        for name, t in before.items()
    }
    config = config_of(drawn.base)
    pair = Pair(write(tmp_path / "base", before, config), write(tmp_path / "tuned", after, config), before, after)
    report = extract(pair, tmp_path / "out")
    found = products(pair.base, tmp_path / "out")
    assert set(found) == {name for name in before if "proj" in name} == {row["matrix"] for row in report["matrices"]}
    for name, product in found.items():
        assert relative(product, pair.change(name)) < 2e-6
        assert relative((after[name].half() - before[name]).double().numpy(), pair.change(name)) > 0.05
    assert distance(outputs(attach(pair.base, tmp_path / "out")), outputs(load(pair.tuned))) <= EXACT


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
    assert config_of(tmp_path / "merged") == config_of(pair.base)
    run = deltaspec.analyze(pair.base, pair.tuned, tmp_path / "run", options=CPU)
    assert [r.key.tensor for r in run.records if re.search("embed_tokens|wte|lm_head", r.key.tensor)] == [key]


@pytest.mark.parametrize(("size", "expected"), [(1e-2, 0.17), (1e-3, 0.79)])
def test_11_a_merge_in_bf16_says_what_it_lost(size, expected, tmp_path):
    """One rounding of base + ΔW: its loss, by NumPy, is the one reported; the base stays, and fp32 keeps the update."""
    generator = torch.Generator().manual_seed(0)
    before = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(96, 64, generator=generator) for i in range(2)}
    before = {name: tensor.bfloat16() for name, tensor in before.items()}
    after = {}
    for name, tensor in before.items():
        update = low_rank((96, 64), 4, generator)
        after[name] = (tensor.double() + size * tensor.double().norm() / update.norm() * update).float()
    pair = Pair(write(tmp_path / "base", before, {}), write(tmp_path / "tuned", after, {}), before, after)
    extract(pair, tmp_path / "lora", amount=4)
    untouched, updates = contents(pair.base), products(pair.base, tmp_path / "lora")
    done = command("merge", pair.base, tmp_path / "lora", "-o", tmp_path / "merged", "--json")
    report, found = json.loads(done.stdout), load_file(tmp_path / "merged" / "model.safetensors")
    assert contents(pair.base) == untouched
    rows = {row["tensor"]: row for row in report["matrices"]}
    lost = total = 0.0
    for name, update in updates.items():
        assert found[name].dtype == torch.bfloat16
        assert np.array_equal(found[name].float().numpy(), summed(before[name], update))
        moved = found[name].double().numpy() - before[name].double().numpy()
        assert rows[name]["relative_loss"] == pytest.approx(relative(moved, update), rel=1e-6)
        assert rows[name]["unchanged_fraction"] == pytest.approx((moved == 0).mean(), abs=1e-12)
        lost, total = lost + ((moved - update) ** 2).sum(), total + (update**2).sum()
    assert report["total"]["relative_loss"] == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert report["total"]["relative_loss"] == pytest.approx(expected, rel=0.15)
    assert "--dtype fp32" in report["remark"]
    kept = deltaspec.merge(pair.base, [tmp_path / "lora"], tmp_path / "fp32", options=deltaspec.MergeOptions("fp32"))
    assert kept.loss.relative < 1e-3
    assert kept.remark() == ""


def test_a_lora_merged_in_bf16_is_found_at_its_rank(tmp_path):
    """Merged by us and by PEFT: above_rounding finds the adapter's modules, each at its rank, and its product."""
    sizes = {"hidden_size": 160, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_models.build("llama", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "o_proj", "up_proj"])
    model = peft.get_peft_model(load(tmp_path / "base").to(torch.bfloat16), options)
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = (0.04 * torch.randn(parameter.shape, generator=generator)).float()
    model.save_pretrained(tmp_path / "lora")
    deltaspec.merge(tmp_path / "base", [tmp_path / "lora"], tmp_path / "ours")
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    wanted = products(tmp_path / "base", tmp_path / "lora")
    assert len(wanted) == 6
    for merged in ("ours", "peft"):
        out = tmp_path / f"from_{merged}"
        chosen = settings("above_rounding", 1)
        (report,) = deltaspec.extract(tmp_path / "base", tmp_path / merged, out, options=chosen).values()
        assert {row["matrix"]: row["rank"] for row in report["matrices"]} == dict.fromkeys(wanted, 4)
        found = products(tmp_path / "base", out)
        for key, product in wanted.items():
            assert relative(found[key], product) < 0.1


def test_extract_merge_and_analyze_agree_with_the_certificate(tmp_path):
    """What is left between merged and tuned is the certificate's error, and what was added its energy."""
    pair = fine_tune("llama", tmp_path, "proj|embed|lm_head", rank=12)
    report = extract(pair, tmp_path / "lora", amount=5)
    deltaspec.merge(pair.base, [tmp_path / "lora"], tmp_path / "merged")
    sides = {"added": (pair.base, tmp_path / "merged"), "left": (tmp_path / "merged", pair.tuned)}
    runs = {name: deltaspec.analyze(*two, tmp_path / name, options=CPU).to_dicts() for name, two in sides.items()}
    added, left = ({row["tensor"]: row for row in rows} for rows in runs.values())
    checked = deltaspec.verify(pair.base, pair.tuned, tmp_path / "lora", options=CPU)
    assert (checked.worse, checked.missing) == ((), ())
    assert {row["matrix"] for row in report["matrices"]} == set(added) == set(left)
    for row in report["matrices"]:
        values = np.linalg.svd(pair.change(row["matrix"]), compute_uv=False)
        assert left[row["matrix"]]["frobenius_norm"] / np.linalg.norm(values) == pytest.approx(row["error"], rel=1e-4)
        assert added[row["matrix"]]["frobenius_norm"] == pytest.approx(np.linalg.norm(values[:5]), rel=1e-4)
        assert added[row["matrix"]]["rank_above_rounding"] == 5
    energy = sum((pair.change(name) ** 2).sum() for name in added)
    rest = sum(row["frobenius_norm"] ** 2 for row in left.values())
    # two sums of the same numbers, in another order: from Python 3.12 on sum() compensates, and the last digit differs
    assert report["totals"]["error"] == pytest.approx(checked.totals.error, rel=1e-14)
    assert checked.totals.error == pytest.approx((rest / energy) ** 0.5, rel=1e-4)


def coarse_pair(folder, kind):
    """Four matrices with an update of rank 4: an fp8 base with block scales beside bf16, or both in fp16."""
    generator = torch.Generator().manual_seed(0)
    stored_base, stored_tuned, before = {}, {}, {}
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.0.{path}.weight"
        weight = torch.randn(128, 96, generator=generator) * 0.02
        update = 0.004 * torch.randn(128, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
        if kind == "fp8":  # tuned is what the base was before it was coded
            scale = weight.view(4, 32, 3, 32).abs().amax((1, 3)) / 448
            spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            codes = (weight / spread).to(torch.float8_e4m3fn)
            stored_base |= {name: codes, f"{name}_scale_inv": scale}
            stored_tuned[name], before[name] = (weight + update).bfloat16(), codes.double() * spread.double()
        else:
            stored_base[name] = weight.half()
            stored_tuned[name], before[name] = (weight.half() + update).half(), weight.half().double()
    config = {"model_type": "llama"}
    coded = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}} if kind == "fp8" else {}
    sides = write(folder / "base", stored_base, config | coded), write(folder / "tuned", stored_tuned, config)
    return Pair(*sides, before, stored_tuned)


@pytest.mark.parametrize("kind", ["fp8", "fp16"])
def test_every_policy_on_coarse_checkpoints(kind, tmp_path):
    pair = coarse_pair(tmp_path, kind)
    spectra = {name: np.linalg.svd(pair.change(name), compute_uv=False) ** 2 for name in pair.before}
    kept = {name: np.cumsum(values) / values.sum() for name, values in spectra.items()}
    policies = {
        "rank": (3, lambda share: 3),
        "energy": (0.8, lambda share: int((share < 0.8).sum()) + 1),
        "error": (0.5, lambda share: int((share < 0.75).sum()) + 1),
        "above_rounding": (1, lambda share: 4),
        "params": (2000, None),
        "size": (8000, None),
    }
    for policy, (amount, rank) in policies.items():
        report = extract(pair, tmp_path / policy, policy, amount)
        found, rows = products(pair.base, tmp_path / policy), {row["matrix"]: row for row in report["matrices"]}
        assert set(rows) == set(pair.before)
        for name, row in rows.items():
            assert rank is None or row["rank"] == rank(kept[name]), (policy, name)
            optimum = (1 - kept[name][row["rank"] - 1]) ** 0.5 if row["rank"] else 1.0
            assert row["optimum"] == pytest.approx(optimum, rel=1e-4)
            assert row["error"] <= optimum * (1 + 1e-4)
            if row["rank"]:
                assert relative(found[name], pair.change(name)) == pytest.approx(row["error"], rel=1e-6)
        tensors = stored(tmp_path / policy).values()
        assert policy != "params" or sum(t.numel() for t in tensors) <= amount
        assert policy != "size" or sum(t.numel() * t.element_size() for t in tensors) <= amount
        checked = deltaspec.verify(pair.base, pair.tuned, tmp_path / policy, options=CPU)
        assert checked.claims
        assert (checked.worse, checked.missing) == ((), ())
    extract(pair, tmp_path / "auto", dtype="auto")
    wanted = torch.bfloat16 if kind == "fp8" else torch.float16
    assert {tensor.dtype for tensor in stored(tmp_path / "auto").values()} == {wanted}
