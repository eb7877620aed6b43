"""A vocabulary that grew before training, in LoRA form: PEFT saves the resized weight beside its factors."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from deltaspec.cli.main import cli
from tests.oracle.parity import QUIET
from tests.tiny_models import VOCAB, build

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
]
OLD, NEW = len(VOCAB), len(VOCAB) + 4
IDS = torch.arange(NEW).reshape(1, -1)


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def grown(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(7)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def make(folder, name, modules, *, saved=None, **config):
    """Write a base, and PEFT's adapter on it after its vocabulary grew; returns what the running model says."""
    build(name).save_pretrained(folder / "base")
    torch.manual_seed(3)
    options = peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, init_lora_weights=False, **config)
    wrapped = peft.get_peft_model(grown(folder / "base"), options).eval()
    with torch.no_grad():
        said = wrapped(IDS).logits
    kwargs = {} if saved is None else {"save_embedding_layers": saved}
    wrapped.save_pretrained(folder / "adapter", **kwargs)
    return said


def read(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(IDS).logits


CASES = {
    "both": ("llama", ["embed_tokens", "lm_head", "q_proj"]),
    "neither": ("llama", ["q_proj"]),
    "tied, both": ("tied", ["embed_tokens", "lm_head", "q_proj"]),
    "tied, neither": ("tied", ["q_proj"]),
    "neox": ("neox", ["embed_in", "embed_out", "query_key_value"]),
    "gpt2, neither": ("gpt2", ["c_attn"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_says_what_pefts_running_model_says(case, tmp_path):
    name, modules = CASES[case]
    said = make(tmp_path, name, modules)
    done = run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == NEW
    found = read(tmp_path / "merged")
    assert found.shape == said.shape
    torch.testing.assert_close(found, said, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("module", "other"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_one_that_grew_without_the_other_is_refused(module, other, tmp_path):
    """PEFT saves the resized weight of the module with factors alone: the other's new rows are nowhere."""
    make(tmp_path, "llama", [module, "q_proj"])
    done = run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet")
    assert done.exit_code == 2
    assert f"'{other}.weight' does not follow" in done.stderr
    assert not (tmp_path / "merged").exists()


def test_rows_that_the_base_has_keep_what_they_had_and_get_the_factors_too(tmp_path):
    make(tmp_path, "llama", ["embed_tokens", "lm_head"])
    given = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet").exit_code == 0
    merged = load_file(tmp_path / "merged/model.safetensors")
    p = "base_model.model.lm_head."
    product = 2.0 * given[f"{p}lora_B.weight"].double() @ given[f"{p}lora_A.weight"].double()
    expected = given[f"{p}base_layer.weight"].double() + product
    assert torch.equal(
        given[f"{p}base_layer.weight"][:OLD], load_file(tmp_path / "base/model.safetensors")["lm_head.weight"]
    )
    torch.testing.assert_close(merged["lm_head.weight"], expected.float(), atol=1e-6, rtol=1e-6)
    report = json.loads((tmp_path / "merged/deltaspec.json").read_text())
    (row,) = [row for row in report["matrices"] if row["tensor"] == "lm_head.weight"]
    assert row["shape"] == [NEW, 16]
    assert row["update"] == pytest.approx(float(product.square().sum()), rel=1e-5)


def test_a_base_that_is_stored_without_the_models_prefix_grows_too(tmp_path):
    make(tmp_path, "llama", ["embed_tokens", "lm_head", "q_proj"])
    assert run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet").exit_code == 0
    file = tmp_path / "base/model.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    done = run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "again", "--quiet")
    assert done.exit_code == 0, done.output
    expected = load_file(tmp_path / "merged/model.safetensors")
    found = load_file(tmp_path / "again/model.safetensors")
    assert {k.removeprefix("model.") for k in expected} == found.keys()
    assert all(torch.equal(v, found[k.removeprefix("model.")]) for k, v in expected.items())


@pytest.mark.parametrize("weight", ["0.5", "-1"])
def test_a_weight_other_than_one_is_refused(weight, tmp_path):
    make(tmp_path, "llama", ["embed_tokens", "lm_head"])
    done = run("merge", tmp_path / "base", f"{tmp_path / 'adapter'}:{weight}", "-o", tmp_path / "merged")
    assert done.exit_code == 2
    assert f"rows grow from {OLD} to {NEW}" in done.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("first", ["grown", "plain"])
def test_another_adapter_of_the_old_vocabulary_cannot_be_added(first, tmp_path):
    make(tmp_path, "llama", ["embed_tokens", "lm_head"])
    plain = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, plain).save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    both = [tmp_path / "adapter", tmp_path / "plain"]
    done = run("merge", tmp_path / "base", *(both if first == "grown" else both[::-1]), "-o", tmp_path / "merged")
    assert done.exit_code == 2
    assert f"rows grow from {OLD} to {NEW}" in done.stderr


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_without_the_new_rows_the_way_out_is_the_resized_base_and_it_works(name, tmp_path):
    said = make(tmp_path, name, ["embed_tokens", "lm_head"], saved=False)
    done = run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet")
    assert done.exit_code == 2
    assert f"resize_token_embeddings({NEW})" in done.stderr
    assert "--" not in done.stderr
    assert "pass the base it was trained from" not in done.stderr  # it is that base
    grown(tmp_path / "base").save_pretrained(tmp_path / "resized")
    done = run("merge", tmp_path / "resized", tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet")
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(read(tmp_path / "merged"), said, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_analyze_says_that_it_grew_and_that_merge_makes_the_model(name, tmp_path):
    make(tmp_path, name, ["embed_tokens", "lm_head"])
    done = run("analyze", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "run", "--quiet")
    assert done.exit_code == 2
    assert "deltaspec merge makes the whole model" in done.stderr
    run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet")
    done = run(
        "analyze", tmp_path / "base", tmp_path / "merged", "--vocab", "common", "-o", tmp_path / "run", "--quiet"
    )
    assert done.exit_code == 0, done.output


def test_another_shape_in_a_merge_offers_no_option_that_merge_lacks(tmp_path):
    make(tmp_path, "llama", ["q_proj"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    stored = {k: torch.cat([v, v]) if k.endswith("q_proj.lora_B.weight") else v for k, v in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    for base in ("base", "other"):
        if base == "other":
            (tmp_path / "base").rename(tmp_path / "other")
        done = run("merge", tmp_path / base, tmp_path / "adapter", "-o", tmp_path / "merged", "--quiet")
        assert done.exit_code == 2
        assert "--" not in done.stderr
        assert ("Pass the base it was trained from" in done.stderr) == (base == "other")
